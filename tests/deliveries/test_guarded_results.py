"""Results that require our API key: only the provider gets it, no host it redirects to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Final

import httpx
import pytest

from receiver import Context, Event, Output, on
from receiver.deliveries.fetch import fetch
from receiver.testing import Kit, make_event

Kits = Callable[..., Kit]
Asked = list[tuple[str, str | None]]
"""The Host and the Authorization of each request."""
AT: Final = "/openrouter/api/v1/videos/1/content"
KEY: Final = "Bearer openrouter-key-of-a-test"
FILM: Final = b"\x00\x00\x00\x18ftypmp42"


@contextmanager
def serving(moves: dict[str, str]) -> Iterator[tuple[int, Asked]]:
    """Answer each request with a video, or with a redirect if `moves` has one for its path."""
    asked: Asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.headers["host"], self.headers["authorization"]))
            to = moves.get(self.path)
            self.send_response(302 if to else 200)
            self.send_header("location", to or "")
            self.send_header("content-length", "0" if to else str(len(FILM)))
            self.end_headers()
            self.wfile.write(b"" if to else FILM)

        def log_message(self, *_: Any) -> None:
            """Write no log."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1], asked
        finally:
            server.shutdown()
            thread.join()


def test_api_key_is_dropped_on_a_redirect_to_another_host(receiver_kit: Kits) -> None:
    films: list[bytes] = []

    @on("succeeded", name="test/keep")
    async def keep(event: Event, ctx: Context) -> None:
        films.extend([(await ctx.fetch(each)).read() for each in event.prediction.output or []])

    moves: dict[str, str] = {}
    with serving(moves) as (port, asked), serving(moves) as (other, heard):
        moves |= {
            AT: "/there",  # the same host, which gets the key again
            "/there": f"http://127.0.0.1:{other}/away",
            "/away": f"http://localhost:{port}/named",
            "/named": f"http://127.0.0.1:{port}/back",
        }
        base = f"http://127.0.0.1:{port}"
        kit = receiver_kit(
            keep, online=True, settings={"OPENROUTER_BASE_URL": f"{base}/openrouter"}
        )
        video = Output(url=base + AT)
        told = kit.deliver(make_event(provider="openrouter", model="google/veo", output=[video]))
        assert (told.delivery.state, films) == ("done", [FILM])
    host = f"127.0.0.1:{port}"
    assert asked == [(host, KEY), (host, KEY), (f"localhost:{port}", None), (host, None)]
    assert heard == [(f"127.0.0.1:{other}", None)]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "location",
    [
        "https://evilopenrouter.ai/x",
        "https://openrouter.ai.evil.example/x",
        "https://cdn.openrouter.ai/x",
        "https://openrouter.ai:8443/x",
        "http://openrouter.ai/x",
        "https://openrouter.ai@evil.example/x",
        "//evil.example/openrouter.ai",
    ],
)
async def test_api_key_is_dropped_on_a_redirect_to_a_lookalike_origin(
    tmp_path: Path, location: str
) -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if len(asked) == 1:
            return httpx.Response(302, headers={"location": location})
        return httpx.Response(200, content=FILM)

    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, follow_redirects=True) as client:
        url = "https://openrouter.ai/api/v1/videos/1/content"
        await fetch(client, url, tmp_path, max_bytes=99, seconds=9, authorization=KEY)
    assert ["authorization" in request.headers for request in asked] == [True, False]
