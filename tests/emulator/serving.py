"""Real servers on loopback, each in its own thread."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Queue
from typing import Any, TypeVar

import httpx
import msgspec
import uvicorn
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from receiver.emulator import Options
from tests.loopback import TLS
from tests.patience import PATIENCE

T = TypeVar("T")

FAST = Options(
    generation=0.02, jitter=0, stray_events=0, time_scale=0.002, eachlabs_per_minute=None
)
KEYS = {
    "oxen": {"authorization": "Bearer key-1"},
    "eachlabs": {"authorization": "Bearer key-1", "x-api-key": "key-1"},
    "fal": {"authorization": "Key key-1"},
}


class Server:
    """A server that runs an app on a free port until it is stopped."""

    def __init__(self, app: ASGIApp, listener: socket.socket | None = None, **more: Any) -> None:
        self._listener = listener or socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        config = uvicorn.Config(
            app, log_level="critical", ws="none", timeout_graceful_shutdown=1, **more
        )
        self._server = uvicorn.Server(config)
        sockets = {"sockets": [self._listener]}
        self._thread = threading.Thread(target=self._server.run, kwargs=sockets)
        self._thread.start()
        ends = time.monotonic() + PATIENCE  # the port takes connections before the app has started
        while self._thread.is_alive() and not self._server.started:
            assert time.monotonic() < ends
            time.sleep(0.005)

    def ask_to_stop(self) -> None:
        self._server.should_exit = True

    def stop(self) -> None:
        self.ask_to_stop()
        self._thread.join()
        self._listener.close()


@contextmanager
def serve(app: ASGIApp, **more: Any) -> Iterator[int]:
    """Serve an app; yield its port."""
    server = Server(app, **more)
    try:
        yield server.port
    finally:
        server.stop()


@dataclass(frozen=True)
class Mail:
    """One received callback."""

    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)


@dataclass
class Mailbox:
    """The callbacks to one URL, each answered with the next scripted status, then with 200."""

    url: str
    statuses: list[int] = field(default_factory=list)
    mails: Queue[Mail] = field(default_factory=Queue)

    def take(self, count: int = 1) -> list[Mail]:
        return [self.mails.get(timeout=PATIENCE) for _ in range(count)]

    def one(self) -> Mail:
        return self.take()[0]


class PostOffice:
    """One server for many mailboxes."""

    def __init__(self) -> None:
        self.boxes: dict[str, Mailbox] = {}
        self.port = 0

    def open(self) -> Mailbox:
        path = f"/callback/{len(self.boxes)}"
        self.boxes[path] = Mailbox(f"http://127.0.0.1:{self.port}{path}")
        return self.boxes[path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        box, body = self.boxes[scope["path"]], await request.body()
        status = box.statuses.pop(0) if box.statuses else 200
        box.mails.put(Mail(dict(request.headers), body, time.time()))
        await Response("thanks", status, headers={"location": box.url})(scope, receive, send)


class Emulated:
    """A client of one emulator that makes the calls of a receiver."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE, verify=TLS)

    def call(self, provider: str, method: str, path: str, **more: Any) -> httpx.Response:
        headers = KEYS[provider] | more.pop("headers", {})
        return self.http.request(method, f"/{provider}{path}", headers=headers, **more)

    def oxen(self, prompt: str = "a lighthouse", **more: Any) -> httpx.Response:
        body = {"model": "nano-banana", "prompt": prompt, **more}
        return self.call("oxen", "POST", "/api/ai/queue", json=body)

    def eachlabs(self, prompt: str = "a lighthouse", **more: Any) -> httpx.Response:
        body = {"model": "nano-banana", "version": "0.0.1", "input": {"prompt": prompt}, **more}
        return self.call("eachlabs", "POST", "/v1/prediction", json=body)

    def fal(
        self, prompt: str = "a lighthouse", *, webhook: str = "", app: str = "fal-ai/nano-banana"
    ) -> httpx.Response:
        query = {"fal_webhook": webhook} if webhook else {}
        return self.call("fal", "POST", f"/queue/{app}", params=query, json={"prompt": prompt})

    def submit(self, provider: str, prompt: str, callback: str = "") -> str:
        """Submit to a provider, and return the provider's id of the prediction."""
        if provider == "oxen":
            return str(self.oxen(prompt).json()["generations"][0]["generation_id"])
        if provider == "eachlabs":
            return str(self.eachlabs(prompt, webhook_url=callback).json()["predictionID"])
        return str(self.fal(prompt, webhook=callback).json()["request_id"])

    def poll(self, provider: str, prediction_id: str) -> httpx.Response:
        paths = {
            "oxen": f"/api/ai/queue/{prediction_id}",
            "eachlabs": f"/v1/prediction/{prediction_id}",
            "fal": f"/queue/fal-ai/nano-banana/requests/{prediction_id}/status",
        }
        return self.call(provider, "GET", paths[provider])

    def finished(self, provider: str, prediction_id: str) -> dict[str, Any]:
        """Poll until the end, and return the last answer."""
        over = {"succeeded", "failed", "cancelled", "success", "error", "COMPLETED"}
        return eventually(
            lambda: self.poll(provider, prediction_id).json(), lambda state: state["status"] in over
        )

    def break_with(self, *rules: dict[str, Any]) -> httpx.Response:
        return self.http.put("/_emulator/faults", json=rules)

    def ledger(self) -> dict[str, Any]:
        report: dict[str, Any] = self.http.get("/_emulator/ledger").json()
        return report

    def row(self, prediction_id: str) -> dict[str, Any]:
        rows = self.ledger()["predictions"]
        return next(row for row in rows if row["id"] == prediction_id)

    def attempts(self, prediction_id: str, count: int) -> Sequence[dict[str, Any]]:
        """Wait until the ledger has `count` attempts at a callback; return all."""
        return eventually(
            lambda: self.row(prediction_id)["callback_attempts"], lambda found: len(found) >= count
        )


def eventually(read: Callable[[], T], condition: Callable[[T], bool]) -> T:
    deadline = time.monotonic() + PATIENCE
    while not condition(value := read()):
        assert time.monotonic() < deadline, value
        time.sleep(0.01)
    return value
