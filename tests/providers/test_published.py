"""A provider's published keys: cached for a day, refreshed after a failed proof, fetched once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import httpx
import pytest
from structlog.testing import capture_logs

from receiver.model.errors import KeysUnavailable, Unreadable
from receiver.providers.published import KEYS_KEPT, REFRESH, published_keys
from receiver.providers.signatures import read_jwks

URL: Final = "https://keys.example/jwks.json"
START: Final = 1_767_225_600.0
Reply = httpx.Response | Exception


def read(body: bytes) -> list[bytes]:
    """Read each word as a key; a body that starts with `!` is unreadable."""
    if body.startswith(b"!"):
        raise Unreadable("no key set")
    return body.split()


def ok(body: bytes) -> httpx.Response:
    return httpx.Response(200, content=body)


class Server:
    """Answers as scripted, then repeats the last answer, and counts the requests."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.asked = 0
        self.entered = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        assert str(request.url) == URL
        self.asked += 1
        self.entered.set()
        await self.open.wait()
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        return httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)


class Scene:
    """A cache with its server and its clock."""

    def __init__(self, *replies: Reply, reader: Callable[[bytes], list[bytes]] = read) -> None:
        self.server = Server(*replies)
        self.now = START
        client = httpx.AsyncClient(transport=httpx.MockTransport(self.server))
        self.keys = published_keys(
            client, lambda: httpx.Request("GET", URL), reader, lambda: self.now
        )

    async def get(self, *, refresh: bool = False) -> Sequence[bytes] | None:
        """Return the keys; None if they are unavailable."""
        try:
            return await self.keys(refresh)
        except KeysUnavailable:
            return None


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scene()

    asyncio.run(main())


def test_keys_are_fetched_once_and_kept_for_a_day() -> None:
    async def scene() -> None:
        it = Scene(ok(b"a b"), ok(b"c"))
        assert await it.get() == (b"a", b"b")
        it.now += KEYS_KEPT - 1
        assert await it.get() == (b"a", b"b")
        assert it.server.asked == 1
        it.now += 1
        assert await it.get() == (b"c",)
        assert it.server.asked == 2

    run(scene)


def test_failed_proof_refreshes_the_keys_at_once() -> None:
    async def scene() -> None:
        it = Scene(ok(b"a"), ok(b"b"))
        assert await it.get() == (b"a",)
        it.now += 0.5
        assert await it.get(refresh=True) == (b"b",)
        assert await it.get() == (b"b",)
        assert it.server.asked == 2

    run(scene)


def test_failed_proofs_refresh_the_keys_at_most_once_a_minute() -> None:
    async def scene() -> None:
        it = Scene(ok(b"a"))
        await it.get()
        for _ in range(1 + 3 * int(REFRESH)):  # forged callbacks, one a second
            it.now += 1
            assert await it.get(refresh=True) == (b"a",)
        assert it.server.asked == 1 + 4

    run(scene)


def test_first_call_may_be_a_refresh() -> None:
    async def scene() -> None:
        it = Scene(ok(b"a"))
        assert await it.get(refresh=True) == (b"a",)
        assert it.server.asked == 1

    run(scene)


def test_error_for_unavailable_keys_names_their_url() -> None:
    async def scene() -> None:
        with pytest.raises(KeysUnavailable, match=URL):
            await Scene(httpx.ConnectError("no route")).keys(False)

    run(scene)


UNFIT: Final[dict[str, Reply]] = {
    "unreachable": httpx.ConnectError("no route"),
    "too slow": httpx.ReadTimeout("slow"),
    "cut off": httpx.RemoteProtocolError("cut"),
    "an error": httpx.Response(500, content=b"a"),
    "not found": httpx.Response(404, content=b"a"),
    "a redirect": httpx.Response(302, headers={"location": "https://evil.example/"}, content=b"a"),
    "a redirect to no URL": httpx.Response(302, headers={"location": "http:x"}, content=b"a"),
    "unreadable": ok(b"!"),
    "without a key": ok(b""),
}


@pytest.mark.parametrize("reply", UNFIT.values(), ids=UNFIT)
def test_failed_first_fetch_is_retried_after_two_seconds(reply: Reply) -> None:
    async def scene() -> None:
        it = Scene(reply, ok(b"a"))
        assert await it.get() is None
        it.now += 1
        assert await it.get() is None
        assert it.server.asked == 1, "a failure is not asked about again at once"
        it.now += 1
        assert await it.get() == (b"a",)

    run(scene)


@pytest.mark.parametrize("reply", UNFIT.values(), ids=UNFIT)
def test_failed_refresh_keeps_the_cached_keys(reply: Reply) -> None:
    async def scene() -> None:
        it = Scene(ok(b"a"), reply)
        await it.get()
        it.now += 1
        assert await it.get(refresh=True) == (b"a",)
        assert it.server.asked == 2
        it.now += 1
        assert await it.get() == (b"a",)

    run(scene)


@pytest.mark.parametrize("reply", UNFIT.values(), ids=UNFIT)
def test_keys_older_than_a_day_are_not_used_even_if_the_refresh_fails(reply: Reply) -> None:
    async def scene() -> None:
        it = Scene(ok(b"a"), reply)
        await it.get()
        it.now += KEYS_KEPT
        assert await it.get() is None
        assert await it.get(refresh=True) is None

    run(scene)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"keys": 1}', b'{"keys": [{"x": "AAAA"}]}', b"[" * 100_000]
)
def test_malformed_jwks_gives_no_keys(body: bytes) -> None:
    async def scene() -> None:
        assert await Scene(ok(body), reader=read_jwks).get() is None

    run(scene)


@pytest.mark.parametrize("refresh", [False, True])
def test_concurrent_calls_share_one_fetch(refresh: bool) -> None:
    async def scene() -> None:
        it = Scene(ok(b"a"))
        it.server.open.clear()
        waiting = [asyncio.create_task(it.get(refresh=refresh)) for _ in range(20)]
        await it.server.entered.wait()
        it.server.open.set()
        assert await asyncio.gather(*waiting) == [(b"a",)] * 20
        assert it.server.asked == 1

    run(scene)


def test_concurrent_calls_share_one_failed_fetch() -> None:
    async def scene() -> None:
        it = Scene(httpx.ConnectError("no route"))
        assert await asyncio.gather(*(it.get() for _ in range(20))) == [None] * 20
        assert it.server.asked == 1

    run(scene)


def test_concurrent_failed_proofs_share_one_refresh() -> None:
    async def scene() -> None:
        it = Scene(ok(b"old"), ok(b"new"))
        await it.get()
        it.now += 1
        it.server.open.clear()
        it.server.entered.clear()
        waiting = [asyncio.create_task(it.get(refresh=True)) for _ in range(20)]
        await it.server.entered.wait()
        assert await it.get() == (b"old",), "who needs no newer keys does not wait"
        it.server.open.set()
        assert await asyncio.gather(*waiting) == [(b"new",)] * 20
        assert it.server.asked == 2

    run(scene)


def test_cancelled_call_does_not_block_the_next() -> None:
    async def scene() -> None:
        it = Scene(ok(b"a"))
        it.server.open.clear()
        impatient = asyncio.create_task(it.get())
        await it.server.entered.wait()
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        it.server.open.set()
        assert await it.get() == (b"a",)

    run(scene)


def test_each_fetch_logs_one_line_without_the_keys() -> None:
    async def scene() -> None:
        it = Scene(ok(b"a b"), httpx.ConnectError("no route"), ok(b""))
        for _ in range(3):
            await it.get(refresh=True)
            it.now += REFRESH

    with capture_logs() as lines:
        run(scene)
    assert lines == [
        {"event": "published.fetched", "what": "keys", "log_level": "info", "url": URL, "count": 2},
        {
            "event": "published.failed",
            "what": "keys",
            "log_level": "warning",
            "url": URL,
            "reason": "ConnectError: no route",
        },
        {
            "event": "published.failed",
            "what": "keys",
            "log_level": "warning",
            "url": URL,
            "reason": "nothing of use in it",
        },
    ]
