"""The registry: the handlers, routes and sources of one app, by name, checked together."""

from __future__ import annotations

import inspect
import operator
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import msgspec

from receiver.deliveries.handlers import Facts, Handler
from receiver.deliveries.ways_in import LISTED, PluginRoute, PluginSource
from receiver.model.answers import ExplainedHandler
from receiver.model.errors import HandlerError
from receiver.model.ids import handler_digest
from receiver.model.text import did_you_mean
from receiver.model.values import Recipients
from receiver.settings.reader import misspelled_of_handlers

if TYPE_CHECKING:  # else it would import the store, which a handler's file does not need
    from receiver.store.inbox import CurrentState


ENTRY_POINTS: Final = "receiver.handlers"


def installed_names() -> frozenset[str]:
    """Return the entry point names of installed handlers, used by this app or not."""
    return frozenset(point.name for point in entry_points(group=ENTRY_POINTS))


Registered: TypeAlias = Handler | PluginRoute | PluginSource
"""An object that a handler file may register."""


@dataclass
class Registry:
    """The handlers, routes and sources of one app, each by name."""

    handlers: dict[str, Handler] = field(default_factory=dict)
    routes: dict[str, PluginRoute] = field(default_factory=dict)
    sources: dict[str, PluginSource] = field(default_factory=dict)

    def all(self) -> list[Registered]:
        """Return all handlers, routes and sources."""
        return [*self.handlers.values(), *self.routes.values(), *self.sources.values()]

    def become(self, other: Registry) -> None:
        """Replace the contents by those of another registry."""
        self.handlers, self.routes, self.sources = other.handlers, other.routes, other.sources

    def add(self, registered: Registered) -> None:
        """Add a handler, route or source; raise HandlerError if it clashes with another."""
        match registered:
            case Handler():
                self._add_handler(registered)
            case PluginRoute():
                _add_way("route", self.routes, registered)
            case PluginSource():
                _add_way("source", self.sources, registered)

    def _add_handler(self, handler: Handler) -> None:
        known = self.handlers.get(handler.name)
        if known is not None and known is not handler:
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
        """Return whether handlers wait for `goal`, directly or through others."""
        known = [self.handlers[name] for name in names if name in self.handlers]
        return goal in names or any(self._leads_to(found.after, goal) for found in known)

    def waiting(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return those of an event's handlers that wait, and for which others of them."""
        found = {}
        known = self.handlers  # in development a reload may replace them meanwhile
        for name in names:
            after = known[name].after if name in known else ()
            if after and (awaited := tuple(other for other in after if other in names)):
                found[name] = awaited
        return found

    def explain(self, event: Facts) -> list[ExplainedHandler]:
        """Return for every handler whether it wants such an event, and if not, why."""
        refusals = {name: handler.refuses(event) for name, handler in self.handlers.items()}
        waiting = self.waiting([name for name, refusal in refusals.items() if refusal is None])
        return [
            ExplainedHandler(
                handler=name,
                runs=refusal is None,
                reason=refusal,
                after=waiting.get(name, ()),
                delivery=None,
            )
            for name, refusal in refusals.items()
        ]

    def warnings(self, providers: Collection[str]) -> list[str]:
        """Return a text for each likely mistake; `providers` are the names that exist."""
        found = [
            f"handler {name} is to run after {other}, which is not a handler here: it will not wait"
            f"{did_you_mean(other, self.handlers)}"
            for name, handler in self.handlers.items()
            for other in handler.after
            # An installed one that is not used here is no mistake: `slack-in` may lack `save`.
            if other not in self.handlers and other not in installed_names()
        ]
        found += [
            f"{one.place}: handler {one.name} wants provider={one.provider_glob!r}, and there is "
            f"none: it will never run{did_you_mean(one.provider_glob, providers)}"
            for one in self.handlers.values()
            if not any(map(one.provider.match, providers))
        ]
        found += [
            f"{one.place}: source {one.name} has no route of its name to answer what it yields"
            for one in self.sources.values()
            if one.name not in self.routes
        ]
        found += misspelled_of_handlers(os.environ)
        if not self.handlers:
            found.append("no handler is registered: outcomes are recorded and nothing else happens")
        return found

    def match(self, known: CurrentState, event_type: str) -> Recipients:
        """Return the handlers that want the event of a prediction, and what they wait for."""
        metadata: dict[str, Any] = {}
        if any(handler.metadata for handler in self.handlers.values()):
            metadata = msgspec.json.decode(known.metadata)
        event = Facts(event_type, known.provider, known.model, metadata, known.reply_to)
        names = self.matching(event)
        return Recipients(tuple(names), self.waiting(names))

    def matching(self, event: Facts) -> list[str]:
        """Return the handlers that want such an event, in the order of their registration."""
        return [name for name, handler in self.handlers.items() if handler.refuses(event) is None]


W = TypeVar("W", PluginRoute, PluginSource)


def _add_way(kind: str, known: dict[str, W], way: W) -> None:
    first = known.setdefault(way.name, way)
    if first is not way:
        raise HandlerError(
            f"{way.place}: the name {way.name!r} is taken by the {kind} at {first.place}"
        )


def handlers_of(function: Callable[..., Any]) -> list[Handler]:
    """Return the handlers that were registered for a function."""
    return [one for one in registered_of(function) if isinstance(one, Handler)]


def registered_of(function: Callable[..., Any]) -> list[Registered]:
    """Return what was registered for a function, for apps that pass functions instead of files."""
    # A function that another decorator wraps is listed in the innermost function's module.
    listed = getattr(inspect.unwrap(function), "__globals__", {}).get(LISTED, [])
    # Each access to an object's method creates a new object, so methods are compared by equality.
    is_it = function.__eq__ if inspect.ismethod(function) else partial(operator.is_, function)
    found: list[Registered] = [one for one in listed if is_it(one.function) is True]
    if not found:  # an object has no globals, and a function may be decorated in another module
        found = [
            one
            for module in list(sys.modules.values())
            for one in getattr(module, "__dict__", {}).get(LISTED, ())
            if is_it(one.function) is True
        ]
    if not found:
        raise HandlerError(f"{function!r} is not a handler; decorate it with @on(…) or @route(…)")
    return found
