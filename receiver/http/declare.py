"""Declared routes: a decorator on a method defines how it is parsed for, called and described.

    @get("/v1/deliveries", "a page of deliveries", problems=["invalid-request"])
    async def list_deliveries(self, query: DeliveriesAsked) -> Page[Delivery]: ...

The names of a method's parameters say where each value is read from:

- `query` and `headers` are structs whose fields are the query's parameters, or headers;
- `metadata` is the values of the query's `metadata.NAME=VALUE`, by NAME;
- `body` is a struct that the JSON body is decoded into;
- `request` is Starlette's request, for everything else;
- any other name is a path parameter, and its type defines the allowed values.

The returned value is the answer's JSON; a `Reply` adds a status or headers, and a Response is sent
as it is. The OpenAPI document is made from the same declarations and the methods' docstrings,
before the package is built (`make docs`).
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Annotated, Any, Final, Generic, TypeAlias, TypeVar, get_type_hints

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.http.auth import Answer, Guard
from receiver.http.body import (
    Nothing,
    header_parameters,
    json_body,
    path_parameter,
    prefixed_parameters,
    query_parameters,
)
from receiver.http.problems import as_json
from receiver.model.errors import Problem
from receiver.model.recipes import METADATA
from receiver.providers import NAMES

_ID: Final = "0199f3a6d2c1e4" + "5b7f1c9d3e8a260f4b"
PredictionId = Annotated[str, Meta(pattern="^pred_[0-9a-f]{32}$", examples=[f"pred_{_ID}"])]
DeliveryId = Annotated[str, Meta(pattern="^dlv_[0-9a-f]{40}$", examples=[f"dlv_{_ID}5c1d0e2f"])]
EventName = Annotated[str, Meta(pattern="^(pred|evt)_[0-9a-f]{32}$", examples=[f"evt_{_ID}"])]
"""A prediction's id or that of its event."""
ReplayId = Annotated[str, Meta(pattern="^rep_[0-9a-f]{32}$", examples=[f"rep_{_ID}"])]
HandlerName = Annotated[
    str, Meta(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=300, examples=["save"])
]
ProviderName = Annotated[str, Meta(extra_json_schema={"enum": list(NAMES)})]
PageSize = Annotated[int, Meta(ge=1, le=100)]
Position = Annotated[str, Meta(pattern="^[0-9]{1,18}$", examples=["1207"])]
"""A position in a sequence, from an earlier answer."""

BODY_PROBLEMS: Final = (
    "invalid-json",
    "too-slow",
    "too-large",
    "unsupported-media-type",
    "invalid-request",
)
"""The problems of any JSON body."""
_JSON: Final = "application/json"

Value = TypeVar("Value")
Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])
Parse: TypeAlias = Callable[[Request], Any]


class Reply(msgspec.Struct, Generic[Value], frozen=True):
    """An answer with a status or headers of its own."""

    value: Value
    status: int
    headers: Mapping[str, str] = {}


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The declaration of one method of one path."""

    method: str
    path: str
    answers: Mapping[int, str]
    """The statuses of success, with their meanings; a plain value gets the first."""
    problems: Sequence[str] = ()
    """Types of `problems.PROBLEMS`, in addition to those of every route."""
    missing: tuple[int, str, str] = (404, "not-found", "there is no such thing")
    """The problem (status, type, detail) for an invalid path parameter."""
    sends: Sequence[str] = ()
    """Headers of its answers, of those that the OpenAPI document describes."""
    media_type: str = "application/json"
    is_open: bool = False
    """It needs no API key."""
    proof: Callable[[Any, Request], None] | None = None
    """Verifies a caller in place of a key, before anything is read; raises Unproved."""
    is_for_cron: bool = False
    """It accepts a key of RECEIVER_CRON_SECRET too."""
    csv: Callable[[Any], str] | None = None
    """Returns its value as CSV, for callers that accept text/csv."""

    @property
    def uses(self) -> Collection[str]:
        """The uses of the keys that it accepts; empty: it needs none.

        If it is for cron, its GET acts as its POST does, so a key that only reads is refused.
        """
        if self.is_open:
            return ()
        return {"all", "drain" if self.is_for_cron else "read" if self.method == "GET" else "all"}


def endpoint(
    method: str,
    path: str,
    answers: str | Mapping[int, str],
    *,
    missing: str | tuple[int, str, str] = "there is no such thing",
    **more: Any,
) -> Callable[[Method], Method]:
    """Declare the route that a method answers; `more` are further fields of `Endpoint`."""

    def declare(function: Method) -> Method:
        function.endpoint = Endpoint(  # type: ignore[attr-defined] # read by `endpoints`
            method=method,
            path=path,
            answers={200: answers} if isinstance(answers, str) else answers,
            missing=(404, "not-found", missing) if isinstance(missing, str) else missing,
            **more,
        )
        return function

    return declare


def get(path: str, answers: str | Mapping[int, str], **more: Any) -> Callable[[Method], Method]:
    return endpoint("GET", path, answers, **more)


def post(path: str, answers: str | Mapping[int, str], **more: Any) -> Callable[[Method], Method]:
    return endpoint("POST", path, answers, **more)


def endpoints(group: type) -> list[tuple[Endpoint, Callable[..., Awaitable[Any]]]]:
    """Return the endpoints that a class declares, in the order of its source."""
    return [
        (function.endpoint, function)
        for function in vars(group).values()
        if hasattr(function, "endpoint")
    ]


def routes(groups: Iterable[object], guard: Guard | None = None) -> list[Route]:
    """Return the routes that objects declare, one for each path.

    Without a guard, none of them may need a key or have a body.
    """
    by_path: dict[str, dict[str, Answer]] = {}
    for group in groups:
        for declared, function in endpoints(type(group)):
            answer = _answering(declared, function, group, guard)
            if guard is not None:
                proof = declared.proof and partial(declared.proof, group)
                answer = guard.guarded(answer, declared.uses, proof)
            by_path.setdefault(declared.path, {})[declared.method] = answer
    return [
        Route(path, _by_method(answers), methods=list(answers)) for path, answers in by_path.items()
    ]


def _by_method(answers: Mapping[str, Answer]) -> Answer:
    async def answer(request: Request) -> Response:
        return await answers["GET" if request.method == "HEAD" else request.method](request)

    return answer


def _answering(
    declared: Endpoint,
    function: Callable[..., Awaitable[Any]],
    group: object,
    guard: Guard | None,
) -> Answer:
    method = getattr(group, function.__name__)
    kinds = dict(parameters_of(function))
    body = kinds.pop("body", None)
    parsers = {name: _parser(name, kind, declared, kinds) for name, kind in kinds.items()}
    status = next(iter(declared.answers))

    takes_none = guard is not None and not declared.is_open and "query" not in kinds

    async def answer(request: Request) -> Response:
        if takes_none:  # any parameter is refused, as it has no effect
            query_parameters(request, Nothing, None)
        given = {name: parse(request) for name, parse in parsers.items()}
        if body is not None and guard is not None:
            given["body"] = json_body(await guard.body(request), body)
        found = await method(**given)
        if isinstance(found, Response):
            return found
        if isinstance(found, Reply):
            return as_json(found.value, found.status, found.headers)
        if declared.csv is not None and _wants_csv(request):
            return Response(declared.csv(found), status, media_type="text/csv")
        return as_json(found, status)

    return answer


def _wants_csv(request: Request) -> bool:
    """Return whether the Accept header names CSV, and no JSON before it."""
    accepted = request.headers.get("accept", "").lower().split(",")
    kinds = [each.partition(";")[0].strip() for each in accepted]
    return "text/csv" in kinds[: kinds.index(_JSON) if _JSON in kinds else None]


@cache
def parameters_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the types of a function's parameters but `self`, by name."""
    hints = get_type_hints(function, include_extras=True)
    names = inspect.signature(function).parameters.keys() - {"self"}
    return {name: kind for name, kind in hints.items() if name in names}


def _parser(name: str, kind: Any, declared: Endpoint, beside: Mapping[str, Any]) -> Parse:
    match name:
        case "request":
            return lambda request: request
        case "query":
            apart = METADATA if "metadata" in beside else None
            return lambda request: query_parameters(request, kind, apart)
        case "metadata":
            return lambda request: prefixed_parameters(request, METADATA)
        case "headers":
            return lambda request: header_parameters(request, kind)
    if f"{{{name}" not in declared.path:
        raise TypeError(f"{declared.path} has no {name} that could be read")
    return lambda request: path_parameter(request, name, kind, Problem(*declared.missing))
