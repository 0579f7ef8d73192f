"""Modules loaded from users' files: each folder is a subpackage of this module.

So a file may have any name, and its imports find the files in its own folder only. A module's name
contains its folder's path, so that another process (multiprocessing's) which imports it by that
name, as pickle does, finds the same file.
"""

from __future__ import annotations

import builtins
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Final

__path__: list[str] = []
"""Makes this module a package; `_Finder` finds its contents."""
_RESERVED_NAMES: Final = sys.stdlib_module_names | {"receiver"}
"""Top-level names that always mean the same module, even if a user's file has the name."""
_BUILT_IN: Final = "receiver_handlers"
_NEVER: Final = _RESERVED_NAMES | {_BUILT_IN, "__main__"}
"""Top-level names that are not forgotten, wherever their files are."""
_INSTALLED: Final = {"site-packages", "dist-packages"}
_DEPTH: Final = __name__.count(".") + 2
"""The number of parts in the module name of a folder."""
_names: Final[dict[Path, str]] = {}
"""Module names of the files that were loaded by path, by resolved path."""


def load_file(path: Path) -> ModuleType:
    """Import a Python file, or the package in a folder, once until it is forgotten.

    Raises ImportError if it is neither, and any error of the file itself.
    """
    path = path.parent if _is_package(path) else path
    real = _real(path)
    known = sys.modules.get(_names.get(real, ""))
    if known is not None:
        return known
    file = path.absolute() / "__init__.py" if path.is_dir() else path.absolute()
    if file.suffix != ".py":
        raise ImportError(f"{path} is not a Python file")
    base, inside = _place_of(file)
    if str(base) not in sys.path:
        sys.path.append(str(base))  # for imports by name that do not use `_import`
    package = f"{__name__}.{os.fsencode(base).hex()}"
    name = ".".join((package, *inside))
    importlib.import_module(name.rpartition(".")[0])
    module = sys.modules.get(name) or _run(name, file)
    _names[real] = name
    return module


def _place_of(file: Path) -> tuple[Path, list[str]]:
    """Return the first folder above a file that is no package, and the module's name in there."""
    base = file.parent.resolve()
    inside = [] if _is_package(file) else [file.stem.replace(".", "_")]
    while (base / "__init__.py").is_file():
        base, inside = base.parent, [base.name, *inside]
    return base, inside


def _is_package(file: Path) -> bool:
    return file.name == "__init__.py"


def _run(name: str, file: Path) -> ModuleType:
    """Run a file as the module of this name; an error leaves no module behind."""
    loader = _Loader(name, str(file))
    folders = [str(file.parent)] if _is_package(file) else None
    spec = importlib.util.spec_from_file_location(
        name, file, loader=loader, submodule_search_locations=folders
    )
    if spec is None:
        raise ImportError(f"{file} is not a Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def forget_all(folder: Path | None) -> dict[str, ModuleType]:
    """Make the next load run all users' files again; return the modules, for `remember`.

    This includes the built-in handlers, which then read their settings files again, and, with a
    folder, the modules that were imported by name from there.
    """
    importlib.invalidate_caches()  # a file may be newer than the list of its folder
    found = {name: module for name, module in list(sys.modules.items()) if _is_users(name, folder)}
    for name in found:
        del sys.modules[name]
    return found


def remember(modules: Mapping[str, ModuleType], folder: Path | None) -> None:
    """Restore forgotten modules, in place of those that were loaded since."""
    forget_all(folder)
    sys.modules.update(modules)


def files(folder: Path | None) -> set[Path]:
    """Return the users' files that are loaded."""
    found = [
        getattr(module, "__file__", None)
        for name, module in list(sys.modules.items())
        if _is_users(name, folder)
    ]
    return {Path(file).absolute() for file in found if file}


def _is_users(name: str, folder: Path | None) -> bool:
    if name.startswith((f"{__name__}.", f"{_BUILT_IN}.")):
        return True
    if folder is None or name.partition(".")[0] in _NEVER:
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    if not file or not Path(file).is_relative_to(folder):
        return False
    return not _INSTALLED & set(Path(file).relative_to(folder).parts)


def forget(path: Path) -> None:
    """Make the next load of a file or package run it again."""
    path = path.parent if _is_package(path) else path
    name = _names.pop(_real(path), None)
    for known in list(sys.modules) if name else ():
        if known == name or known.startswith(f"{name}."):
            del sys.modules[known]


def _real(path: Path) -> Path:
    """Return a path without symbolic links; one that leads to itself stays (`resolve` raises)."""
    return Path(os.path.realpath(path))


def short_name(module: str) -> str:
    """Return a module's file name without `.py`; its full name if it was not loaded here."""
    return module.rpartition(".")[2] if module.startswith(f"{__name__}.") else module


def inside_of(module: ModuleType) -> list[ModuleType]:
    """Return a package's own modules that were imported."""
    prefix = f"{module.__name__}."
    return [found for name, found in list(sys.modules.items()) if name.startswith(prefix)]


class _Finder:
    """A finder of folders by their module names, and of the files in them."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        if name.count(".") == _DEPTH - 1:
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [os.fsdecode(bytes.fromhex(name.rpartition(".")[2]))]
            return spec
        found = PathFinder.find_spec(name, path)
        if found is not None and isinstance(found.loader, SourceFileLoader):
            found.loader = _Loader(name, found.loader.path)
        return found


sys.meta_path.insert(0, _Finder)


class _Loader(SourceFileLoader):
    """A loader of files whose imports look in their own folder first, as a script's do."""

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


def _import(
    name: str,
    globals: Mapping[str, Any] | None = None,  # noqa: A002 - the names that `import` has
    locals: Mapping[str, Any] | None = None,  # noqa: A002
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """Import as `import` does; a file beside the importing one by its module name in here."""
    package = None if level or globals is None else _package_with(name, globals)
    if package is None:
        return builtins.__import__(name, globals, locals, fromlist or (), level)
    module = builtins.__import__(f"{package}.{name}", globals, locals, fromlist or (), 0)
    return module if fromlist else sys.modules[f"{package}.{name.partition('.')[0]}"]


def _package_with(name: str, importing: Mapping[str, Any]) -> str | None:
    """Return the package in here that has a file of this name beside the importing module."""
    top = name.partition(".")[0]
    if top in _RESERVED_NAMES:
        return None
    package = importing.get("__package__") or ""
    for candidate in dict.fromkeys([package, ".".join(package.split(".")[:_DEPTH])]):
        whole = f"{candidate}.{top}"
        # In a file with the name of an installed module, that name means the installed one.
        if whole == importing.get("__name__") or candidate not in sys.modules:
            continue
        spec = PathFinder.find_spec(whole, sys.modules[candidate].__path__)
        if spec is not None and (spec.origin or importlib.util.find_spec(top) is None):
            return candidate
    return None
