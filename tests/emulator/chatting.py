"""Emulated chat platforms and an app that they call, in process or over sockets."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from receiver.emulator import create_emulator
from receiver.emulator.chats.platforms import Chats
from receiver.emulator.inprocess import EmulatedChats
from tests import loopback
from tests.emulator.serving import FAST, Server, serve
from tests.patience import PATIENCE

RECEIVER, OWN = "https://receiver.test", "https://chats.test"
JSON = "application/json"


@dataclass(frozen=True)
class Told:
    """One request that a platform sent."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


@dataclass
class App:
    """An app that records requests and sends scripted responses; the last one repeats."""

    answers: list[Response] = field(default_factory=lambda: [Response()])
    told: list[Told] = field(default_factory=list)
    judge: Callable[[Told], Response | None] = lambda _: None
    """If it returns a response, that is sent instead of the scripted one."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        told = Told(scope["path"], dict(request.headers), await request.body())
        self.told.append(told)
        answer = self.judge(told)
        if answer is None:
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        await answer(scope, receive, send)

    def one(self) -> Told:
        [told] = self.told
        return told


def said(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type=JSON)


class Inside:
    """An app and the platforms, without sockets."""

    def __init__(
        self, *answers: Response, now: Callable[[], float] = lambda: 1_700_000_000.0
    ) -> None:
        self.app = App(list(answers) or [Response()])
        self.transport = EmulatedChats(RECEIVER, OWN, now)
        self.transport.calls(httpx.AsyncClient(transport=httpx.ASGITransport(self.app)))
        self.chats: Chats = self.transport.chats
        self.http = httpx.AsyncClient(transport=self.transport)


@dataclass
class Outside:
    """An app and the platforms, connected by sockets."""

    app: App
    url: str
    chats: Chats

    def do(self, method: str, path: str, body: object = None) -> Any:
        answer = loopback.request(
            method, f"{self.url}/_emulator/chat{path}", json=body or {}, timeout=PATIENCE
        )
        assert answer.is_success, answer.text
        return answer.json()

    def say(self, platform: str, text: str, **more: str) -> Any:
        return self.do("POST", f"/{platform}/say", {"text": text, **more})["exchange"]


@contextmanager
def outside(*answers: Response) -> Iterator[Outside]:
    app = App(list(answers) or [Response()])
    with serve(app, lifespan="off") as port, socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        options = msgspec.structs.replace(FAST, receiver=f"http://127.0.0.1:{port}", own=url)
        emulator = create_emulator(options)
        server = Server(emulator, listener)
        try:
            yield Outside(app, url, emulator.state.chats)
        finally:
            server.stop()
