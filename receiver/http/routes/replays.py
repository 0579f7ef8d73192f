"""`/v1/replays`: owe again what was delivered, skipped or given up; first counted, then done."""

from __future__ import annotations

from typing import Final, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.http.auth import Guard
from receiver.http.body import complaint, named, one_of, parameters
from receiver.http.declare import UNREADABLE, Answer, Content, Endpoint, PageSize, ReplayId
from receiver.http.problems import as_json
from receiver.model.errors import Problem
from receiver.providers import NAMES
from receiver.store.replays import Replay, Selection
from receiver.store.values import Page


class Reads(Protocol):
    """What these routes need of the store."""

    async def find(self, replay_id: str) -> Replay | None: ...
    async def page(self, limit: int, cursor: str | None) -> Page[Replay]: ...


class Works(Protocol):
    """What they need of whoever does it."""

    async def count(self, wanted: Selection) -> Replay: ...
    async def start(self, replay_id: str) -> bool: ...
    async def cancel(self, replay_id: str) -> bool: ...


class ReplaysAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which replays to list."""

    limit: PageSize = 50
    cursor: ReplayId | None = None
    """The `next_cursor` of the page before."""


class ReplayRoutes:
    """The routes about replays in bulk."""

    def __init__(self, guard: Guard, store: Reads, replayer: Works) -> None:
        self._guard = guard
        self._store = store
        self._replayer = replayer

    def routes(self) -> list[Route]:
        one = "/v1/replays/{id}"
        route = self._guard.route
        return [
            route("/v1/replays", GET=self.list_replays, POST=self.count),
            route(one, GET=self.read),
            route(one + "/start", POST=self.start),
            route(one + "/cancel", POST=self.cancel),
        ]

    async def count(self, request: Request) -> Response:
        wanted = _selection(await self._guard.body(request))
        replay = await self._replayer.count(wanted)
        return as_json(replay, 201, {"Location": f"/v1/replays/{replay.id}"})

    async def list_replays(self, request: Request) -> Response:
        asked = parameters(request, ReplaysAsked)
        return as_json(await self._store.page(asked.limit, asked.cursor))

    async def read(self, request: Request) -> Response:
        return as_json(await self._find(request))

    async def start(self, request: Request) -> Response:
        """Begin; asking twice is asking once."""
        started = await self._replayer.start(_id(request))
        replay = await self._find(request)
        if not started and replay.state == "canceled":
            raise Problem(409, "replay-canceled", "the replay was canceled: count a new one")
        return as_json(replay, 202)

    async def cancel(self, request: Request) -> Response:
        """Owe nothing further; what is owed by now stays owed, and `replayed` says how much."""
        canceled = await self._replayer.cancel(_id(request))
        replay = await self._find(request)
        if not canceled and replay.state == "done":
            raise Problem(409, "replay-ended", "the replay has ended: nothing is left to cancel")
        return as_json(replay)

    async def _find(self, request: Request) -> Replay:
        replay = await self._store.find(_id(request))
        if replay is None:
            raise _missing()
        return replay


def _missing() -> Problem:
    return Problem(404, "not-found", "no such replay")


def _id(request: Request) -> str:
    return named(request, "id", ReplayId, _missing())


def _selection(body: bytes) -> Selection:
    try:
        wanted = msgspec.json.decode(body, type=Selection)
    except msgspec.ValidationError as error:
        raise Problem(422, "invalid-request", complaint(Selection, str(error))) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Problem(400, "invalid-json", "the body is not JSON") from error
    if not any(getattr(wanted, name) for name in wanted.__struct_fields__):
        names = ", ".join(wanted.__struct_fields__)
        raise Problem(422, "invalid-request", f"give at least one of {names}")
    one_of("provider", wanted.provider, NAMES)
    return wanted


_EXAMPLE: Final = Replay(
    id="rep_0199f3a6d2c1e45b7f1c9d3e8a260f4b",
    state="counted",
    events=1200,
    matched=1200,
    replayed=0,
    wanted={"handler": "save", "state": "dead"},
    created_at="2026-01-31T12:00:00.000000Z",
    ended_at=None,
)
_SOME: Final = {
    "properties": {"provider": {"enum": [*NAMES, None]}},
    "anyOf": [
        {"required": [name], "properties": {name: {"not": {"type": "null"}}}}
        for name in Selection.__struct_fields__
    ],
}
_COUNTED: Final = ("postReplaysIdStart", "postReplaysIdCancel", "getReplaysId")
OPERATIONS: Final = (
    Endpoint(
        "POST",
        "/v1/replays",
        "Count the deliveries that are like this, to owe them again",
        (
            Answer(
                201,
                "how many there are; nothing is owed before it is started",
                Content(Replay, _EXAMPLE),
                headers=("Location",),
                leads_to=_COUNTED,
            ),
        ),
        UNREADABLE,
        "At least one of these must be given.",
        body=(Content(Selection, Selection(handler="save", state="dead"), also=_SOME),),
    ),
    Endpoint(
        "GET",
        "/v1/replays",
        "List replays, newest first",
        (
            Answer(
                200,
                "a page of replays",
                Content(Page[Replay], Page(data=[_EXAMPLE], next_cursor=None)),
                leads_to=_COUNTED,
            ),
        ),
        ("invalid-request",),
        query=ReplaysAsked,
    ),
    Endpoint(
        "GET",
        "/v1/replays/{id}",
        "Read how far a replay is",
        (Answer(200, "the replay", Content(Replay)),),
        ("not-found",),
        names={"id": ReplayId},
    ),
    Endpoint(
        "POST",
        "/v1/replays/{id}/start",
        "Begin a replay that was counted",
        (Answer(202, "it is under way, or has ended", Content(Replay)),),
        ("not-found", "replay-canceled"),
        names={"id": ReplayId},
    ),
    Endpoint(
        "POST",
        "/v1/replays/{id}/cancel",
        "Let a replay owe nothing further; what is owed by now stays owed",
        (Answer(200, "it is canceled", Content(Replay)),),
        ("not-found", "replay-ended"),
        names={"id": ReplayId},
    ),
)
