"""Handlers: the decorator that registers them, how they match, and how their files are loaded."""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar

import msgspec

from receiver.deliveries import loading as loaded
from receiver.deliveries.loading import forget, inside_of, load_file, short_name
from receiver.deliveries.ways_in import LISTED, PluginRoute, PluginSource, takes
from receiver.model.errors import HandlerError
from receiver.model.ids import handler_digest
from receiver.model.retry import Policy
from receiver.model.text import meant
from receiver.model.values import Recipients, plain

if (
    TYPE_CHECKING
):  # at run time it would bring the store along, which a handler's file has no use for
    from receiver.store.inbox import CurrentState

F = TypeVar("F", bound=Callable[..., Any])

TYPES: Final = ("succeeded", "failed", "canceled")
ENTRY_POINTS: Final = "receiver.handlers"
_PREFIX: Final = "prediction."
TIMEOUT: Final = 60.0
"""Seconds for one attempt, unless a handler says otherwise."""


class Retry(Exception):
    """A policy for `on(retry=…)`, or, raised by a handler, the wish to be tried again.

    Shapes: `retry=Retry(attempts=8, base=1, cap=600)`; `raise Retry(after=30)`,
    `raise Retry("rate limited", after=30)`. Times are seconds. What is not given is the default.
    """

    def __init__(
        self,
        reason: str = "",
        *,
        after: float | None = None,
        attempts: int | None = None,
        base: float | None = None,
        cap: float | None = None,
    ) -> None:
        super().__init__(reason or "the handler asked to be tried again")
        _check_number("after", after, least=0)
        _check_number("attempts", attempts, least=1)
        _check_number("base", base, least=0)
        _check_number("cap", cap, least=0)
        self.after = after
        self.attempts = attempts
        self.base = base
        self.cap = cap

    def policy(self, default: Policy) -> Policy:
        """Fill what is not given from `default`."""
        return Policy(
            attempts=default.attempts if self.attempts is None else self.attempts,
            base=default.base if self.base is None else self.base,
            cap=default.cap if self.cap is None else self.cap,
        )


class Skip(Exception):
    """Raised by a handler: there is nothing to do for this event; the delivery ends `skipped`."""


class Dead(Exception):
    """Raised by a handler: trying again cannot help; the delivery ends `dead`."""


def _check_number(name: str, value: object, *, least: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class Handler:
    """One registered function with the events it wants and the way it is run."""

    name: str
    """Stored with deliveries: it must stay the same over releases."""
    function: Callable[..., Any]
    types: frozenset[str]
    """Full event types."""
    provider: re.Pattern[str]
    model: re.Pattern[str]
    metadata: Mapping[str, re.Pattern[str]]
    retry: Retry
    timeout: float
    """Seconds for one attempt."""
    concurrency: int
    """Attempts that may run at once."""
    place: str
    """File and line, for messages."""
    is_async: bool
    takes_context: bool
    """False: it is called with the event alone."""
    after: tuple[str, ...] = ()
    """Handlers whose deliveries of the same event are to end first, however they end."""
    inline: bool | None = None
    """Whether it runs within the callback's request, where RECEIVER_AFTER says so; None: if its
    timeout fits in there, or was left as it is."""
    provider_glob: str = "*"
    """What `provider` was made of."""
    reply_to: re.Pattern[str] | None = None
    """Where it is given: only predictions that were submitted with such a `reply_to`."""

    def may_run_within(self, seconds: float) -> bool:
        """Return whether to begin it in a request that waits for so long at most."""
        if self.inline is not None:
            return self.inline
        return self.timeout <= seconds or self.timeout == TIMEOUT

    def refuses(
        self,
        event_type: str,
        provider: str,
        model: str,
        metadata: Mapping[str, Any],
        reply_to: str | None = None,
    ) -> str | None:
        """Return why this handler does not want an event; None: it does."""
        if event_type not in self.types:
            return f"type is {event_type}"
        if not self.provider.match(provider):
            return f"provider is {provider}"
        if not self.model.match(model):
            return f"model is {model}"
        for key, pattern in self.metadata.items():
            if key not in metadata or not pattern.match(plain(metadata[key])):
                return f"metadata {key} is {metadata.get(key)!r}"
        if self.reply_to and not (reply_to and self.reply_to.match(reply_to)):
            return f"reply_to is {reply_to!r}"
        return None


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What becomes of an event at one handler."""

    handler: str
    runs: bool
    reason: str | None
    """Why it does not run."""
    after: tuple[str, ...]
    """The handlers it waits for."""


Registered: TypeAlias = Handler | PluginRoute | PluginSource
"""What a handler file may hold."""


@dataclass
class Registry:
    """The handlers of one app, and its plugins' ways in, each by name."""

    handlers: dict[str, Handler] = field(default_factory=dict)
    routes: dict[str, PluginRoute] = field(default_factory=dict)
    sources: dict[str, PluginSource] = field(default_factory=dict)

    def all(self) -> list[Registered]:
        """Return all that was registered."""
        return [*self.handlers.values(), *self.routes.values(), *self.sources.values()]

    def add(self, registered: Registered) -> None:
        """Add one, or raise HandlerError."""
        match registered:
            case Handler():
                self._add_handler(registered)
            case PluginRoute():
                _add_way("route", self.routes, registered)
            case PluginSource():
                _add_way("source", self.sources, registered)

    def _add_handler(self, handler: Handler) -> None:
        known = self.handlers.get(handler.name)
        if known is not None and known.function is not handler.function:
            raise HandlerError(
                f"{handler.place}: the name {handler.name!r} is taken by the handler at "
                f"{known.place}; give one of them its own by on(…, name=…)"
            )
        if self._leads_to(handler.after, handler.name):
            raise HandlerError(
                f"{handler.place}: {handler.name!r} would wait for itself by after={handler.after}"
            )
        for name in self.handlers.keys() - {handler.name}:
            if handler_digest(name) == handler_digest(handler.name):
                raise HandlerError(
                    f"{handler.place}: rename {handler.name!r}: it clashes with {name!r}"
                )
        self.handlers[handler.name] = handler

    def _leads_to(self, names: Sequence[str], goal: str) -> bool:
        """Return whether handlers wait for another, be it by way of further ones."""
        known = [self.handlers[name] for name in names if name in self.handlers]
        return goal in names or any(self._leads_to(found.after, goal) for found in known)

    def waiting(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Of handlers that want one event, give those that wait, and for which others of them."""
        found = {}
        known = self.handlers  # in development others may be put in their place meanwhile
        for name in names:
            after = known[name].after if name in known else ()
            if after and (awaited := tuple(other for other in after if other in names)):
                found[name] = awaited
        return found

    def explain(
        self,
        event_type: str,
        provider: str,
        model: str,
        metadata: Mapping[str, Any],
        reply_to: str | None,
    ) -> list[Explained]:
        """Say of every handler whether it wants such an event, and if not, why."""
        refusals = {
            name: handler.refuses(event_type, provider, model, metadata, reply_to)
            for name, handler in self.handlers.items()
        }
        waiting = self.waiting([name for name, refusal in refusals.items() if refusal is None])
        return [
            Explained(
                handler=name, runs=refusal is None, reason=refusal, after=waiting.get(name, ())
            )
            for name, refusal in refusals.items()
        ]

    def strangers(self) -> list[tuple[str, str]]:
        """Pair handlers with those they wait for and nobody registered."""
        return [
            (name, other)
            for name, handler in self.handlers.items()
            for other in handler.after
            if other not in self.handlers
        ]

    def warnings(self, providers: Collection[str]) -> list[str]:
        """Say what is likely a mistake, among these providers."""
        found = [
            f"handler {name} is to run after {other}, which is no handler here: it will not wait"
            f"{meant(other, self.handlers)}"
            for name, other in self.strangers()
        ]
        found += [
            f"{one.place}: handler {one.name} wants provider={one.provider_glob!r}, and there is "
            f"none: it will never run{meant(one.provider_glob, providers)}"
            for one in self.handlers.values()
            if not any(map(one.provider.match, providers))
        ]
        if not self.handlers:
            found.append("no handler is registered: outcomes are recorded and nothing else happens")
        return found

    def match(self, known: CurrentState, event_type: str) -> Recipients:
        """Return the handlers that want the event of a prediction, and what they wait for."""
        metadata: dict[str, Any] = {}
        if any(handler.metadata for handler in self.handlers.values()):
            metadata = msgspec.json.decode(known.metadata)
        names = self.wanting(event_type, known.provider, known.model, metadata, known.reply_to)
        return Recipients(tuple(names), self.waiting(names))

    def wanting(
        self,
        event_type: str,
        provider: str,
        model: str,
        metadata: Mapping[str, Any],
        reply_to: str | None = None,
    ) -> list[str]:
        """Return the handlers that want such an event, in the order of their registration."""
        return [
            name
            for name, handler in self.handlers.items()
            if handler.refuses(event_type, provider, model, metadata, reply_to) is None
        ]


W = TypeVar("W", PluginRoute, PluginSource)


def _add_way(kind: str, known: dict[str, W], way: W) -> None:
    first = known.setdefault(way.name, way)
    if first.function is not way.function:
        raise HandlerError(
            f"{way.place}: the name {way.name!r} is taken by the {kind} at {first.place}"
        )


def on(
    *types: Literal["succeeded", "failed", "canceled", "*"],
    provider: str = "*",
    model: str = "*",
    metadata: Mapping[str, str] | None = None,
    name: str | None = None,
    retry: Retry | None = None,
    timeout: float = TIMEOUT,
    concurrency: int = 16,
    after: str | Sequence[str] = (),
    reply_to: str | None = None,
    inline: bool | None = None,
    **unknown: object,
) -> Callable[[F], F]:
    """Register a function for the terminal events of predictions.

    `types` are succeeded, failed, canceled or * (none given: *); `provider`, `model` and the values
    of `metadata` are shell globs. `timeout` is seconds per attempt, `concurrency` attempts at once.
    `after` names handlers that are to be through with the same event first, if they want it too;
    however they end, and for a day at most. With `reply_to`, a glob too, it gets only the events of
    predictions that were submitted with such an address to reply to. `inline` says whether it
    runs within the callback's request where RECEIVER_AFTER has handlers run there; else it does if
    its timeout fits in that time, or was left as it is.
    The function takes the event, or the event and a Context, and stays callable as it was.
    Raises HandlerError with file and line for anything unknown or unfit.
    """
    frame = sys._getframe(1)  # noqa: SLF001 - the one cheap way to name the caller
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    registered: list[Registered] = frame.f_globals.setdefault(LISTED, [])

    def register(function: F) -> F:
        handler = _make(
            function,
            place=place,
            types=types,
            provider=provider,
            model=model,
            metadata={} if metadata is None else metadata,
            name=name,
            retry=retry,
            timeout=timeout,
            concurrency=concurrency,
            after=after,
            reply_to=reply_to,
            inline=inline,
            unknown=unknown,
        )
        registered.append(handler)
        return function

    return register


def handlers_of(function: Callable[..., Any]) -> list[Handler]:
    """Return the handlers among what was registered for a function."""
    return [one for one in registered_of(function) if isinstance(one, Handler)]


def registered_of(function: Callable[..., Any]) -> list[Registered]:
    """Return what was registered for a function, for apps that name functions instead of files."""
    # What another decorator wraps was written where the innermost function was.
    listed = getattr(inspect.unwrap(function), "__globals__", {}).get(LISTED, [])
    found: list[Registered] = [one for one in listed if one.function is function]
    if not found:
        raise HandlerError(f"{function!r} is no handler; decorate it with @on(…) or @route(…)")
    return found


def _make(function: Callable[..., Any], *, place: str, **given: Any) -> Handler:
    try:
        return _checked(function, place, given)
    except (TypeError, ValueError) as error:
        raise HandlerError(f"{place}: {error}") from error


def _checked(function: Callable[..., Any], place: str, given: Mapping[str, Any]) -> Handler:
    if given["unknown"]:
        unknown = sorted(given["unknown"])
        known = given.keys() - {"types", "unknown"}
        raise TypeError(f"on() has no parameter {', '.join(unknown)}{meant(unknown[0], known)}")
    _check_number("timeout", given["timeout"], least=0.001)
    _check_number("concurrency", given["concurrency"], least=1)
    if not isinstance(given["inline"], bool | None):
        raise TypeError(f"inline must be True or False, not {given['inline']!r}")
    retry = Retry() if given["retry"] is None else given["retry"]
    if not isinstance(retry, Retry):
        raise TypeError(f"retry must be a Retry(…), not {retry!r}")
    takes_context = _takes_context(function)
    if not isinstance(given["metadata"], Mapping):
        raise TypeError(f"metadata must be a mapping of names to globs, not {given['metadata']!r}")
    name = _name_of(function) if given["name"] is None else given["name"]
    if not isinstance(name, str) or not name or not name.isprintable():
        raise TypeError(f"name must be a printable text, not {name!r}")
    return Handler(
        name=name,
        function=function,
        types=_types(given["types"]),
        provider=_glob("provider", given["provider"]),
        model=_glob("model", given["model"]),
        metadata={str(key): _glob(key, value) for key, value in given["metadata"].items()},
        retry=retry,
        timeout=float(given["timeout"]),
        concurrency=int(given["concurrency"]),
        place=place,
        is_async=inspect.iscoroutinefunction(function)
        or inspect.iscoroutinefunction(getattr(function, "__call__", None)),  # noqa: B004
        takes_context=takes_context,
        after=_after(given["after"]),
        inline=given["inline"],
        provider_glob=given["provider"],
        reply_to=None if given["reply_to"] is None else _glob("reply_to", given["reply_to"]),
    )


def _after(given: object) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"after must be the name of a handler or several, not {given!r}")
    return tuple(names)


def _name_of(function: Callable[..., Any]) -> str:
    try:
        return f"{short_name(function.__module__)}:{function.__qualname__}"
    except AttributeError:
        raise TypeError(f"{function!r} has no name of its own; give it one by name=…") from None


def _types(types: Sequence[object]) -> frozenset[str]:
    words = [str(word).removeprefix(_PREFIX) for word in types]
    for word in words:
        if word not in (*TYPES, "*"):
            raise ValueError(
                f"unknown event type {word!r}: use succeeded, failed, canceled or *"
                f"{meant(word, TYPES)}"
            )
    wanted = TYPES if not words or "*" in words else words
    return frozenset(_PREFIX + word for word in wanted)


def _glob(name: str, pattern: object) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise TypeError(f"{name} must be a text with shell wildcards, not {pattern!r}")
    return re.compile(fnmatch.translate(pattern))


def _takes_context(function: Callable[..., Any]) -> bool:
    """Return whether the function wants (event, ctx) or (event); TypeError: neither."""
    if not callable(function):
        raise TypeError(f"a handler must be a function, not {function!r}")
    if inspect.isclass(function):
        raise TypeError(f"a handler must be a function, and {function!r} is a class")
    inner = inspect.unwrap(function)
    for one in (function, inner, getattr(inner, "__call__", None)):  # noqa: B004 - its code
        if inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one):
            raise TypeError(f"{function!r} yields, so that calling it runs nothing: use return")
    takes_context = takes(function, 2)
    if not takes_context and not takes(function, 1):
        raise TypeError(f"{function!r} must take (event) or (event, ctx)")
    return takes_context


def load(names: Sequence[str]) -> Registry:
    """Import every named file, module or installed entry point, and collect its handlers.

    Raises HandlerError for all that cannot be found, read or registered.
    """
    registry, problems = look(names)
    if problems:
        raise HandlerError("\n".join(problems))
    return registry


def look(names: Sequence[str]) -> tuple[Registry, list[str]]:
    """Load what can be loaded; tell also all problems.

    Files that belong together are named in one call: each call runs them anew, so that the handlers
    of one which another imports would be others.
    """
    registry = Registry()
    problems = []
    for name in filter(_is_path, names):
        forget(Path(name))  # an app that is made again reads its handlers' settings again
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
    """Load all anew, with the files that they import.

    Raises HandlerError, and then what was loaded before is as it was.
    """
    folder = None if all(map(_is_path, names)) else Path.cwd()
    before = loaded.forget_all(folder)
    try:
        return load(names)
    except BaseException:
        loaded.remember(before, folder)
        raise


def loaded_files(names: Sequence[str]) -> set[Path]:
    """Return the files that these names, and what they import, have brought along."""
    return loaded.files(None if all(map(_is_path, names)) else Path.cwd())


def register(handlers: Sequence[str | Callable[..., Any] | Registered]) -> Registry:
    """Return a registry of names as in RECEIVER_HANDLERS, decorated functions and handlers.

    Raises HandlerError.
    """
    registry = load([name for name in handlers if isinstance(name, str)])
    for given in handlers:
        if not isinstance(given, str):
            for handler in [given] if isinstance(given, Registered) else registered_of(given):
                registry.add(handler)
    return registry


def _found_in(name: str) -> list[Registered]:
    """Return the handlers that a module has: decorated in it, imported by it by their names.

    A package has those of its modules too that are imported.
    """
    module = _import(name)
    modules = [module, *(inside_of(module) if hasattr(module, "__path__") else ())]
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
    except Exception:  # noqa: BLE001 - an object that answers oddly is no handler
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
        near = meant(name, _names_here()) if error.name == name else ""
        raise HandlerError(f"{name}: cannot be loaded: {_where(error)}{error!r}{near}") from error
    except BaseException as error:  # a file may end in sys.exit()
        raise HandlerError(f"{name}: cannot be loaded: {_where(error)}{error!r}") from error


def _names_here() -> list[str]:
    """Name what could have been meant: what is installed, and what lies in this folder."""
    installed = [point.name for point in entry_points(group=ENTRY_POINTS)]
    return [*installed, *(file.stem for file in Path.cwd().glob("*.py"))]


_LONGEST_LINE: Final = 120


def _syntax(name: str, error: SyntaxError) -> str:
    """Say where an error of syntax is, with its line and a mark below, as Python does."""
    if not error.filename or error.filename.startswith("<") or not error.lineno:
        return f"{name}: cannot be loaded: {_where(error)}{error!r}"
    line, column = (error.text or "").rstrip(), error.offset or 1
    head = f"{_nearby(error.filename)}:{error.lineno}:{column}: {error.msg}"
    if not line or not 0 < column <= _LONGEST_LINE:
        return head
    shown = line.expandtabs(1)[:_LONGEST_LINE]
    return f"{head}\n    {shown}\n    {' ' * (column - 1)}^"


def _nearby(filename: str) -> str:
    """Name a file from the working folder, if it lies there."""
    path = Path(filename)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else filename


def _import_path(path: Path) -> ModuleType:
    if path.is_dir() and not (path / "__init__.py").is_file():
        raise HandlerError(f"{path}: no such file; this folder has no __init__.py: name its files")
    if not path.exists():
        raise HandlerError(f"{path}: no such file")
    if path.is_file() and path.suffix != ".py":
        raise HandlerError(f"{path}: not a Python file")
    return load_file(path)


_LOADERS: Final = {__file__, importlib.__file__, loaded.__file__}


def _where(error: BaseException) -> str:
    """Name the innermost file and line of an error outside this program."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if not filename.startswith("<") and filename not in _LOADERS:
            place = f"{_nearby(filename)}:{trace.tb_lineno}: "
        trace = trace.tb_next
    return place
