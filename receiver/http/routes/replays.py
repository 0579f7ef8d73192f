"""The routes `/v1/replays`: redeliver many deliveries, which are counted first."""

from __future__ import annotations

from typing import Final

import msgspec

from receiver.http.declare import BODY_PROBLEMS, PageSize, ReplayId, Reply, get, post
from receiver.http.parts import Parts
from receiver.model.answers import Page, Replay, Selection
from receiver.model.errors import Problem
from receiver.providers import NAMES

_MISSING: Final = "no such replay"


class ReplaysAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which replays to list."""

    limit: PageSize = 50
    cursor: ReplayId | None = None
    """The `next_cursor` of the page before."""


class ReplayRoutes:
    """The routes about replays in bulk."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store.replays
        self._replayer = parts.deliveries.replayer

    @post(
        "/v1/replays",
        {201: "how many there are; nothing is pending before it is started"},
        problems=BODY_PROBLEMS,
        sends=["Location"],
    )
    async def count(self, body: Selection) -> Reply[Replay]:
        """Count the deliveries that match, to redeliver them.

        At least one field must be given.
        """
        if not any(getattr(body, name) for name in body.__struct_fields__):
            names = ", ".join(body.__struct_fields__)
            raise Problem(422, "invalid-request", f"give at least one of {names}")
        if body.provider not in {None, *NAMES}:
            raise Problem(422, "invalid-request", f"provider must be one of {', '.join(NAMES)}")
        replay = await self._replayer.count(body)
        return Reply(replay, 201, {"Location": f"replays/{replay.id}"})

    @get("/v1/replays", "a page of replays", problems=["invalid-request"])
    async def list_replays(self, query: ReplaysAsked) -> Page[Replay]:
        """List replays, newest first.

        They may be counted, running, done or canceled.
        """
        return await self._store.page(query.limit, query.cursor)

    @get("/v1/replays/{id}", "the replay", problems=["not-found"], missing=_MISSING)
    async def read(self, id: ReplayId) -> Replay:
        """Read the progress of a replay.

        `replayed` of `matched` deliveries have been redelivered so far.
        """
        return await self._find(id)

    @post(
        "/v1/replays/{id}/start",
        {202: "it is under way, or has ended"},
        problems=["not-found", "replay-canceled"],
        missing=_MISSING,
    )
    async def start(self, id: ReplayId) -> Replay:
        """Start a replay that was counted; a second call changes nothing.

        It continues by itself, also after restarts; the answer does not wait for it.
        """
        started = await self._replayer.start(id)
        replay = await self._find(id)
        if not started and replay.state == "canceled":
            raise Problem(409, "replay-canceled", "the replay was canceled: count a new one")
        return replay

    @post(
        "/v1/replays/{id}/cancel",
        "it is canceled",
        problems=["not-found", "replay-ended"],
        missing=_MISSING,
    )
    async def cancel(self, id: ReplayId) -> Replay:
        """Cancel a replay; deliveries that it has redelivered stay pending.

        A replay that has ended is answered 409.
        """
        canceled = await self._replayer.cancel(id)
        replay = await self._find(id)
        if not canceled and replay.state == "done":
            raise Problem(409, "replay-ended", "the replay has ended: nothing is left to cancel")
        return replay

    async def _find(self, replay_id: str) -> Replay:
        replay = await self._store.find(replay_id)
        if replay is None:
            raise Problem(404, "not-found", _MISSING)
        return replay
