"""The import of handlers: from files, modules, or installed names (entry points)."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from receiver.deliveries import handlers, loading
from receiver.deliveries.registry import (
    ENTRY_POINTS,
    Registered,
    Registry,
    installed_names,
    registered_of,
)
from receiver.deliveries.ways_in import LISTED
from receiver.model.errors import HandlerError
from receiver.model.text import did_you_mean

_LONGEST_LINE: Final = 120


def load(names: Sequence[str]) -> Registry:
    """Import every named file, module or installed entry point, and collect its handlers.

    Raises one HandlerError for all names that cannot be found, read or registered.
    """
    registry, problems = load_and_check(names)
    if problems:
        raise HandlerError("\n".join(problems))
    return registry


def load_and_check(names: Sequence[str]) -> tuple[Registry, list[str]]:
    """Load the handlers that can be loaded; return them and all problems.

    Files that import each other must be named in one call: each call runs its files again, so a
    handler that is imported from an earlier call's file would be another object.
    """
    registry = Registry()
    problems = []
    for name in filter(_is_path, names):
        # An app that is created again reads its handlers' settings again.
        loading.forget(Path(name))
    for name in names:
        try:
            found = _found_in(name)
        except HandlerError as error:
            problems.append(str(error))
            continue
        for handler in found:
            try:
                registry.add(handler)
            except HandlerError as error:
                problems.append(str(error))
    return registry, problems


def reload(names: Sequence[str]) -> Registry:
    """Load all handlers again, with the files that they import.

    Raises HandlerError; the modules that were loaded before are then restored.
    """
    folder = None if all(map(_is_path, names)) else Path.cwd()
    before = loading.forget_all(folder)
    try:
        return load(names)
    except BaseException:
        loading.remember(before, folder)
        raise


def loaded_files(names: Sequence[str]) -> set[Path]:
    """Return the files that were loaded for these names, imported ones included."""
    return loading.files(None if all(map(_is_path, names)) else Path.cwd())


def register(handlers: Sequence[str | Callable[..., Any] | Registered]) -> Registry:
    """Return a registry of names (as in RECEIVER_HANDLERS), decorated functions and handlers.

    Raises HandlerError.
    """
    if isinstance(handlers, str) or callable(handlers):
        raise HandlerError(f"handlers must be a list, as [{handlers!r}] is, not {handlers!r}")
    registry = load([name for name in handlers if isinstance(name, str)])
    for given in handlers:
        if not isinstance(given, str):
            for handler in [given] if isinstance(given, Registered) else registered_of(given):
                registry.add(handler)
    return registry


def _found_in(name: str) -> list[Registered]:
    """Return the handlers that are decorated in a module, or that it imports by name.

    For a package, those of its imported modules are included.
    """
    module = _import(name)
    modules = [module, *(loading.inside_of(module) if hasattr(module, "__path__") else ())]
    own = [handler for one in modules for handler in getattr(one, LISTED, [])]
    imported = [handler for value in vars(module).values() for handler in _listed(value)]
    found = {id(handler): handler for handler in [*own, *imported]}
    if not found:
        raise HandlerError(f"{name}: has no handler; decorate a function with @on(…) or @route(…)")
    return list(found.values())


def _listed(value: object) -> list[Registered]:
    if not callable(value) or inspect.isclass(value):
        return []
    try:
        listed = getattr(inspect.unwrap(value), "__globals__", {}).get(LISTED, [])
    except Exception:  # noqa: BLE001 - an object whose attributes raise is no handler
        return []
    return [handler for handler in listed if handler.function is value]


def _is_path(name: str) -> bool:
    return name.endswith(".py") or "/" in name


def _import(name: str) -> ModuleType:
    try:
        if _is_path(name):
            return _import_path(Path(name))
        named = [point for point in entry_points(group=ENTRY_POINTS) if point.name == name]
        if not named and not {"", str(Path.cwd())} & set(sys.path):
            sys.path.append(str(Path.cwd()))
        return importlib.import_module(named[0].value if named else name)
    except HandlerError:
        raise
    except SyntaxError as error:
        raise HandlerError(_syntax(name, error)) from error
    except ModuleNotFoundError as error:
        near = did_you_mean(name, _names_here()) if error.name == name else ""
        raise HandlerError(f"{name}: cannot be loaded: {_where(error)}{error!r}{near}") from error
    except BaseException as error:  # a file may call sys.exit()
        raise HandlerError(f"{name}: cannot be loaded: {_where(error)}{error!r}") from error


def _names_here() -> list[str]:
    """Return names to suggest: installed handlers, and files in the working folder."""
    return [*installed_names(), *(file.stem for file in Path.cwd().glob("*.py"))]


def _syntax(name: str, error: SyntaxError) -> str:
    """Return the text of a syntax error: its place, its line, and a mark below it."""
    if not error.filename or error.filename.startswith("<") or not error.lineno:
        return f"{name}: cannot be loaded: {_where(error)}{error!r}"
    line, column = (error.text or "").rstrip(), error.offset or 1
    head = f"{_nearby(error.filename)}:{error.lineno}:{column}: {error.msg}"
    if not line or not 0 < column <= _LONGEST_LINE:
        return head
    shown = line.expandtabs(1)[:_LONGEST_LINE]
    return f"{head}\n    {shown}\n    {' ' * (column - 1)}^"


def _nearby(filename: str) -> str:
    """Return a file's path relative to the working folder if it is in there, else as given."""
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename


def _import_path(path: Path) -> ModuleType:
    if path.is_dir() and not (path / "__init__.py").is_file():
        raise HandlerError(f"{path}: no such file; this folder has no __init__.py: name its files")
    if not path.exists():
        raise HandlerError(f"{path}: no such file")
    if path.is_file() and path.suffix != ".py":
        raise HandlerError(f"{path}: not a Python file")
    return loading.load_file(path)


_LOADERS: Final = {__file__, handlers.__file__, importlib.__file__, loading.__file__}


def _where(error: BaseException) -> str:
    """Return the innermost file and line of an error outside the import machinery."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if not filename.startswith("<") and filename not in _LOADERS:
            place = f"{_nearby(filename)}:{trace.tb_lineno}: "
        trace = trace.tb_next
    return place
