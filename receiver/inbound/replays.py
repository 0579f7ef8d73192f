"""`/v1/replays`: owe again what was delivered, skipped or given up; first counted, then done."""

from __future__ import annotations

from typing import Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.errors import Problem
from receiver.inbound.answers import as_json
from receiver.inbound.guard import Guard
from receiver.inbound.reading import one_of, page_size, query
from receiver.providers import NAMES
from receiver.store.replays import Replay, Selection
from receiver.store.values import Found


class Reads(Protocol):
    """What these routes need of the store."""

    async def find(self, replay_id: str) -> Replay | None: ...
    async def page(self, limit: int, cursor: str | None) -> Found: ...


class Works(Protocol):
    """What they need of whoever does it."""

    async def count(self, wanted: Selection) -> Replay: ...
    async def start(self, replay_id: str) -> bool: ...
    async def cancel(self, replay_id: str) -> bool: ...


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
        params = query(request, "limit", "cursor")
        return as_json(await self._store.page(page_size(params["limit"]), params["cursor"]))

    async def read(self, request: Request) -> Response:
        return as_json(await self._find(request))

    async def start(self, request: Request) -> Response:
        """Begin; asking twice is asking once."""
        started = await self._replayer.start(request.path_params["id"])
        replay = await self._find(request)
        if not started and replay.state == "canceled":
            raise Problem(409, "canceled", "the replay was canceled: count a new one")
        return as_json(replay, 202)

    async def cancel(self, request: Request) -> Response:
        """Owe nothing further; what is owed by now stays owed, and `replayed` says how much."""
        canceled = await self._replayer.cancel(request.path_params["id"])
        replay = await self._find(request)
        if not canceled and replay.state == "done":
            raise Problem(409, "done", "the replay has ended: there is nothing left to cancel")
        return as_json(replay)

    async def _find(self, request: Request) -> Replay:
        replay = await self._store.find(request.path_params["id"])
        if replay is None:
            raise Problem(404, "not-found", "no such replay")
        return replay


def _selection(body: bytes) -> Selection:
    try:
        wanted = msgspec.json.decode(body, type=Selection)
    except msgspec.ValidationError as error:
        raise Problem(422, "invalid-request", str(error)) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Problem(400, "invalid-json", "the body is not JSON") from error
    if not any(getattr(wanted, name) for name in wanted.__struct_fields__):
        names = ", ".join(wanted.__struct_fields__)
        raise Problem(422, "invalid-request", f"give at least one of {names}")
    one_of("provider", wanted.provider, NAMES)
    if wanted.since and wanted.until and wanted.since >= wanted.until:
        raise Problem(422, "invalid-request", "since must be before until")
    return wanted
