"""Routes and sources of plugins: routes are served at `/in/<name>`, and sources poll.

    @route("slack", proof=prove)
    async def slack(call: Call, door: Door) -> Reply: ...

`http` serves what is registered here; a route without a proof is an error at start.
"""

from __future__ import annotations

import codecs
import inspect
import re
import sys
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import Any, Final, Self, TypeAlias, TypeVar, overload
from urllib.parse import parse_qsl

import msgspec

from receiver.model.errors import HandlerError, Problem, Unproved
from receiver.model.requests import refuse_coding
from receiver.model.text import did_you_mean

T = TypeVar("T")

LISTED: Final = "__receiver_handlers__"
"""The global of a module that lists what `on`, `route` and `source` registered in it."""
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9_-]{0,62}[a-z0-9])?", re.ASCII)
_KEYWORD: Final = inspect.Parameter.KEYWORD_ONLY
METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")
_HEADER: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
_VALUE: Final = re.compile(r"[\t -~]*", re.ASCII)
_LARGEST: Final = 64 * 1024 * 1024
_MOST_FIELDS: Final = 1000
_STATUSES: Final = range(200, 600)
LONGEST: Final = 1_000_000
"""Default limit of a body, in bytes."""
TIMEOUT: Final = 2.5
"""Seconds: chat platforms give up after three, and repeat the call."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call that a route received or a source found; nothing of it is parsed yet."""

    method: str = "POST"
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    """Values by names in lower case; the values of a repeated header are joined by a comma."""
    body: bytes = b""
    at: float = 0.0
    """When it came, in Unix seconds."""
    client: str = ""
    """The client's address."""
    rest: str = ""
    """The path after the route's name, for a route with `rest`."""

    def header(self, name: str, default: str = "") -> str:
        """Return a header; its name is case-insensitive."""
        return self.headers.get(name.lower(), default)

    @overload
    def json(self) -> Any: ...
    @overload
    def json(self, kind: type[T]) -> T: ...
    def json(self, kind: Any = Any) -> Any:
        """Decode the body as JSON; the caller is answered 400 if it does not fit `kind`.

        A compressed body is answered 415; a BOM before the JSON is ignored.
        """
        refuse_coding(self.header("content-encoding"))
        try:
            return msgspec.json.decode(self.body.removeprefix(codecs.BOM_UTF8), type=kind)
        except msgspec.ValidationError as error:
            raise Problem(400, "invalid-body", f"the body does not fit: {error}") from None
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            raise Problem(400, "invalid-json", "the body is not JSON") from None

    def form(self) -> dict[str, str]:
        """Decode the body as a form; the caller is answered 400 if it is not one."""
        try:
            text = self.body.decode("ascii")
            pairs = parse_qsl(
                text,
                keep_blank_values=True,
                strict_parsing=bool(text),
                errors="strict",
                max_num_fields=_MOST_FIELDS,
            )
        except ValueError:
            raise Problem(400, "invalid-body", "the body is not a form") from None
        return dict(pairs)


@dataclass(frozen=True)
class Reply:
    """An answer; `Reply.json`, `Reply.text` and `Reply.empty` create the usual ones."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in _STATUSES:
            raise ValueError(f"status must be a number from 200 to 599, not {self.status!r}")
        memoryview(self.body)  # TypeError unless it is bytes
        for name, value in self.headers.items():
            if not _HEADER.fullmatch(name) or not _VALUE.fullmatch(value):
                raise ValueError(f"{name!r} is not a header that can be sent")

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Self:
        return cls(
            status,
            msgspec.json.encode(value),
            {"Content-Type": "application/json", **(headers or {})},
        )

    @classmethod
    def text(cls, text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Self:
        return cls(
            status,
            text.encode(),
            {"Content-Type": "text/plain; charset=utf-8", **(headers or {})},
        )

    @classmethod
    def empty(cls, status: int = 200, headers: Mapping[str, str] | None = None) -> Self:
        return cls(status, b"", dict(headers or {}))


Proof: TypeAlias = Callable[..., Awaitable[None] | None]
"""Takes the call, or the call and a Door; returns nothing, or raises Unproved."""
Answer: TypeAlias = Callable[[Call, Any], Coroutine[Any, Any, Reply]]
"""Takes the call and a Door, which `http` creates."""
Generate: TypeAlias = Callable[[Any], AsyncGenerator[Call | None, Any]]


@dataclass(frozen=True, kw_only=True)
class PluginRoute:
    """A plugin's route, served at `/in/<name>`."""

    name: str
    function: Answer
    proof: Proof
    proof_takes_door: bool
    longest: int
    """Limit of a body, in bytes."""
    methods: tuple[str, ...]
    rest: bool
    """Whether it is served at `/in/<name>/…` too."""
    timeout: float
    """Seconds for the proof, and again for the answer."""
    place: str
    """File and line, for messages."""


@dataclass(frozen=True, kw_only=True)
class PluginSource:
    """A plugin's source of calls, polled in one process at a time."""

    name: str
    function: Generate
    place: str


A = TypeVar("A", bound=Answer)
G = TypeVar("G", bound=Generate)


def route(
    name: str,
    *,
    proof: Proof | None = None,
    longest: int = LONGEST,
    methods: Sequence[str] = ("POST",),
    rest: bool = False,
    timeout: float = TIMEOUT,
    **unknown: object,
) -> Callable[[A], A]:
    """Register an async function of a Call and a Door, which returns a Reply, at `/in/<name>`.

    `proof` is called first, with the raw bytes and headers, and with the Door if it takes one; it
    returns nothing, or raises Unproved.
    `longest` limits the body in bytes; `rest` serves `/in/<name>/…` too, as `call.rest`. A call
    that takes longer than `timeout` seconds is answered 503, so that the caller repeats it.
    Raises HandlerError with file and line for an unknown parameter or an invalid value.
    """
    place, listed = begin_registering('@route("name", proof=…)', name)

    def register(function: A) -> A:
        try:
            _check_name(name)
            check_unknown(route, unknown)
            listed.append(
                PluginRoute(
                    name=name,
                    function=_checked_answer(function),
                    proof=(proved := _checked_proof(proof)),
                    proof_takes_door=not takes(proved, 1),
                    longest=_number("longest", longest, most=_LARGEST, whole=True),
                    methods=_checked_methods(methods),
                    rest=flag("rest", rest),
                    timeout=float(_number("timeout", timeout, most=60)),
                    place=place,
                )
            )
        except (TypeError, ValueError) as error:
            raise HandlerError(f"{place}: {error}") from error
        return function

    return register


def source(name: str, **unknown: object) -> Callable[[G], G]:
    """Register an async generator function of a Door, which polls and yields calls.

    Its calls need no proof: its own connection and key prove them. `reply = yield call` passes the
    call to the route of the same name; a call that is answered 500 or more must be yielded again.
    It runs in one process at a time, as long as the receiver runs; after an error, or its end, it
    is started again. Raises HandlerError with file and line.
    """
    place, listed = begin_registering('@source("name")', name)

    def register(function: G) -> G:
        try:
            _check_name(name)
            check_unknown(source, unknown)
            _check_generates(function)
            listed.append(PluginSource(name=name, function=function, place=place))
        except (TypeError, ValueError) as error:
            raise HandlerError(f"{place}: {error}") from error
        return function

    return register


def begin_registering(decorator: str, given: object) -> tuple[str, list[Any]]:
    """Return the file and line of a decorator, and the list of its module's registrations.

    Raises HandlerError if the decorator was written without its parentheses.
    """
    frame = sys._getframe(2)  # noqa: SLF001 - the one cheap way to name the caller's caller
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    if callable(given):
        raise HandlerError(f"{place}: a decorator needs its parentheses: {decorator}")
    return place, frame.f_globals.setdefault(LISTED, [])


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shape = "of small letters, digits, - and _, 64 at most, with no - or _ at its ends"
        raise ValueError(f"name must be {shape}, not {name!r}")


def check_unknown(decorator: Callable[..., Any], unknown: Collection[str]) -> None:
    """Raise TypeError if a decorator was given parameters that it does not have."""
    if unknown:
        names = sorted(unknown)
        given = inspect.signature(decorator).parameters.values()
        near = did_you_mean(names[0], [each.name for each in given if each.kind == _KEYWORD])
        raise TypeError(f"{decorator.__name__}() has no parameter {', '.join(names)}{near}")


def _check_takes(function: Callable[..., Any], number: int, shape: str) -> None:
    check_bound(function)
    if not takes(function, number):
        raise TypeError(f"{called(function)} must take {shape}")


def called(function: object) -> str:
    """Return the qualified name of a function, or the repr of another object."""
    return getattr(function, "__qualname__", None) or repr(function)


def check_bound(function: Callable[..., Any]) -> None:
    """Raise TypeError for a method that is decorated in its class: it is not bound to an object."""
    try:
        [*names] = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return
    if names[:1] == ["self"]:
        raise TypeError(f"{called(function)} is a method without its object: decorate a function")


def takes(function: Callable[..., Any], number: int) -> bool:
    """Return whether a function can be called with `number` positional arguments alone."""
    try:
        inspect.signature(function).bind(*[None] * number)
    except (TypeError, ValueError):
        return False
    return True


def _check_generates(function: Callable[..., Any]) -> None:
    if not inspect.isasyncgenfunction(function):
        raise TypeError(f"{called(function)} must be an async generator: `async def`, and `yield`")
    _check_takes(function, 1, "(door)")


def _checked_answer(function: Any) -> Answer:
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"{called(function)} must be an async function")
    _check_takes(function, 2, "(call, door)")
    return function  # type: ignore[no-any-return]


def _checked_proof(proof: Proof | None) -> Proof:
    if proof is None:
        raise TypeError("a route needs proof=…: a function of the call that raises Unproved")
    if inspect.isclass(proof) or not callable(proof):
        raise TypeError(f"proof must be a function, not {proof!r}")
    if inspect.isgeneratorfunction(proof) or inspect.isasyncgenfunction(proof):
        raise TypeError(f"{called(proof)} yields, so that calling it proves nothing")
    if not takes(proof, 1) and not takes(proof, 2):
        raise TypeError(f"{proof!r} must take (call) or (call, door)")
    return proof


def _checked_methods(methods: object) -> tuple[str, ...]:
    given: tuple[Any, ...] = tuple(methods) if isinstance(methods, Collection) else ()
    if not given or any(method not in METHODS for method in given):
        raise ValueError(f"methods must be of {', '.join(METHODS)}, not {methods!r}")
    return given


def _number(name: str, value: Any, *, most: int, whole: bool = False) -> Any:
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= most:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{name} must be {kind} above 0, up to {most}, not {value!r}")
    return value


def flag(name: str, value: object) -> bool:
    """Return a switch; raise TypeError for another value."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


__all__ = ["Call", "PluginRoute", "PluginSource", "Reply", "Unproved", "route", "source"]
