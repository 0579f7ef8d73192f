"""Declared pages: a decorated method of a group answers a path below `/ui`.

    @page("/handlers")
    async def handlers(self) -> View: ...

    @action("/predictions/{id}/cancel", "cancel")
    async def cancel(self, id: PredictionId) -> None: ...

A page returns a `View`, or a Response that is sent as it is. An action is a POST by a person who is
signed in with a key that may act: it writes one row of the audit trail and one line of the log, and
redirects to the page of the form, or to the path that it returns. A method may have the parameter
`context`; its other parameters are read from the path, and their types define the allowed values.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

from receiver.dashboard.context import PageContext
from receiver.http.body import path_parameter
from receiver.http.declare import parameters_of
from receiver.model.errors import Problem

Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])
Query: TypeAlias = Mapping[str, str]


class View(NamedTuple):
    """A template with its values."""

    template: str
    values: Mapping[str, Any]
    status: int = 200


class Declared(NamedTuple):
    """One method of one path."""

    method: str
    path: str
    action: str = ""
    """The name of an action in the audit trail."""
    is_open: bool = False
    """It needs no sign-in."""
    is_part: bool = False
    """It is a part of a page, and the limit has been charged for the page."""


def page(path: str, *, is_open: bool = False, is_part: bool = False) -> Callable[[Method], Method]:
    return _declare(Declared("GET", path, is_open=is_open, is_part=is_part))


def action(path: str, name: str, *, is_open: bool = False) -> Callable[[Method], Method]:
    return _declare(Declared("POST", path, name, is_open))


def _declare(declared: Declared) -> Callable[[Method], Method]:
    def declare(function: Method) -> Method:
        function.declared = declared  # type: ignore[attr-defined] # read by `pages`
        return function

    return declare


def pages(group: object) -> list[tuple[Declared, Callable[..., Awaitable[Any]]]]:
    """Return the methods that an object declares, bound to it."""
    return [
        (function.declared, getattr(group, name))
        for name, function in vars(type(group)).items()
        if hasattr(function, "declared")
    ]


_MISSING = Problem(404, "not-found", "there is no such thing")


def arguments(method: Callable[..., Awaitable[Any]], context: PageContext) -> dict[str, Any]:
    """Return the arguments of a method; raise Problem if a path parameter is not of its type."""
    kinds, request = parameters_of(method), context.request
    given = {
        name: path_parameter(request, name, kinds[name], _MISSING) for name in request.path_params
    }
    return given | ({"context": context} if "context" in kinds else {})
