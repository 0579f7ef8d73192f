"""Handlers: the decorator `on`, which checks and registers a function, and event filters."""

from __future__ import annotations

import fnmatch
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, TypeVar

from receiver.deliveries.loading import short_name
from receiver.deliveries.ways_in import (
    begin_registering,
    called,
    check_bound,
    check_unknown,
    flag,
    takes,
)
from receiver.model.errors import HandlerError
from receiver.model.retry import Policy
from receiver.model.text import did_you_mean
from receiver.model.values import plain

F = TypeVar("F", bound=Callable[..., Any])

TYPES: Final = ("succeeded", "failed", "canceled")
_PREFIX: Final = "prediction."
_LONGEST_NAME: Final = 300
"""Characters: the API could not take a longer name."""
TIMEOUT: Final = 60.0
"""Default seconds for one attempt."""


class Retry(Exception):
    """A policy for `on(retry=…)`, or, raised by a handler, a request to be tried again.

    Shapes: `retry=Retry(attempts=8, base=1, cap=600)`; `raise Retry(after=30)`,
    `raise Retry("rate limited", after=30)`. Times are seconds. Omitted values have their defaults.
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
        for name, value in (("after", after), ("base", base), ("cap", cap)):
            if value is not None:
                _check_number(name, value, least=0)
        if attempts is not None:
            _check_number("attempts", attempts, least=1, whole=True)
        self.after = after
        self.attempts = attempts
        self.base = base
        self.cap = cap

    def policy(self, default: Policy) -> Policy:
        """Return the policy; values that are not given come from `default`."""
        return Policy(
            attempts=default.attempts if self.attempts is None else self.attempts,
            base=default.base if self.base is None else self.base,
            cap=default.cap if self.cap is None else self.cap,
        )


class Skip(Exception):
    """Raised by a handler: there is nothing to do for this event; the delivery ends `skipped`."""


class Dead(Exception):
    """Raised by a handler: trying again cannot help; the delivery ends `dead`."""


def _check_number(name: str, value: object, *, least: float, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if whole and not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, not {value!r}")


class Facts(NamedTuple):
    """The facts of an event that handlers choose it by."""

    type: str
    provider: str
    model: str
    metadata: Mapping[str, Any]
    reply_to: str | None = None


@dataclass(frozen=True, kw_only=True)
class Handler:
    """One registered function, the events it wants, and how it is run."""

    name: str
    """Stored with deliveries: it must stay the same across releases."""
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
    """Handlers whose deliveries of the same event must end first, in any state."""
    inline: bool | None = None
    """Whether it runs within the callback's request if RECEIVER_AFTER enables that; None: if its
    timeout fits in there, or is the default."""
    provider_glob: str = "*"
    """The source of the pattern `provider`."""
    reply_to: re.Pattern[str] | None = None
    """If set, it gets only events of predictions that were submitted with a matching `reply_to`."""

    def may_run_within(self, seconds: float) -> bool:
        """Return whether it may start in a request that waits for `seconds` at most."""
        if self.inline is not None:
            return self.inline
        return self.timeout <= seconds or self.timeout == TIMEOUT

    def refuses(self, event: Facts) -> str | None:
        """Return why this handler does not want an event; None if it does."""
        if event.type not in self.types:
            return f"type is {event.type}"
        if not self.provider.match(event.provider):
            return f"provider is {event.provider}"
        if not self.model.match(event.model):
            return f"model is {event.model}"
        for key, pattern in self.metadata.items():
            has_it = key in event.metadata
            if not has_it or not pattern.match(plain(event.metadata[key])):
                return f"metadata {key} is {repr(event.metadata[key]) if has_it else 'missing'}"
        if self.reply_to and not (event.reply_to and self.reply_to.match(event.reply_to)):
            return f"reply_to is {event.reply_to!r}"
        return None


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
    `after` names handlers whose deliveries of the same event must end first, in any state, if they
    want it too; it waits for a day at most. With `reply_to`, also a glob, it gets only the events
    of predictions that were submitted with a matching `reply_to`. `inline` sets whether it runs
    within the callback's request if RECEIVER_AFTER runs handlers there; by default it does if its
    timeout fits in that time, or is the default.
    The function takes the event, or the event and a Context, and stays callable as it was.
    Raises HandlerError with file and line for an unknown parameter or an invalid value.
    """
    place, listed = begin_registering('@on("succeeded")', types[0] if types else None)

    def register(function: F) -> F:
        try:
            check_unknown(on, unknown)
            _check_number("timeout", timeout, least=0.001)
            _check_number("concurrency", concurrency, least=1, whole=True)
            handler = Handler(
                takes_context=_takes_context(function),
                name=_name(name, function),
                function=function,
                types=_types(types),
                provider=_glob("provider", provider),
                model=_glob("model", model),
                metadata=_globs({} if metadata is None else metadata),
                retry=_retry(retry),
                timeout=float(timeout),
                concurrency=concurrency,
                place=place,
                is_async=_is_async(function),
                after=_after(after),
                inline=None if inline is None else flag("inline", inline),
                provider_glob=provider,
                reply_to=None if reply_to is None else _glob("reply_to", reply_to),
            )
        except (TypeError, ValueError) as error:
            raise HandlerError(f"{place}: {error}") from error
        listed.append(handler)
        return function

    return register


def _retry(given: object) -> Retry:
    retry = Retry() if given is None else given
    if not isinstance(retry, Retry):
        raise TypeError(f"retry must be a Retry(…), not {retry!r}")
    if retry.after is not None:
        raise TypeError("retry has attempts, base and cap: after=… is for `raise Retry(…)`")
    return retry


def _globs(given: object) -> dict[str, re.Pattern[str]]:
    if not isinstance(given, Mapping):
        raise TypeError(f"metadata must be a mapping of names to globs, not {given!r}")
    return {str(key): _glob(key, value) for key, value in given.items()}


def _name(given: object, function: Callable[..., Any]) -> str:
    name = _name_of(function) if given is None else given
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME or not name.isprintable():
        raise TypeError(f"name must be a printable text of {_LONGEST_NAME} at most, not {name!r}")
    return name


def _is_async(function: Callable[..., Any]) -> bool:
    called = getattr(function, "__call__", None)  # noqa: B004 - of an object that is callable
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


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
                f"{did_you_mean(word, TYPES)}"
            )
    wanted = TYPES if not words or "*" in words else words
    return frozenset(_PREFIX + word for word in wanted)


def _glob(name: str, pattern: object) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise TypeError(f"{name} must be a text with shell wildcards, not {pattern!r}")
    return re.compile(fnmatch.translate(pattern))


def _takes_context(function: Callable[..., Any]) -> bool:
    """Return whether the function takes (event, ctx), not (event); TypeError if neither."""
    if not callable(function):
        raise TypeError(f"a handler must be a function, not {function!r}")
    name = called(function)
    if inspect.isclass(function):
        raise TypeError(f"a handler must be a function, and {name} is a class")
    inner = inspect.unwrap(function)
    for one in (function, inner, getattr(inner, "__call__", None)):  # noqa: B004 - its code
        if inspect.isgeneratorfunction(one) or inspect.isasyncgenfunction(one):
            raise TypeError(f"{name} yields, so that calling it runs nothing: use return")
    check_bound(function)
    takes_context = takes(function, 2)
    if not takes_context and not takes(function, 1):
        raise TypeError(f"{name} must take (event) or (event, ctx)")
    return takes_context
