"""Helpers for tests of built-in handlers: their paths, and a server with scripted answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

from receiver.testing import Delivered

HANDLERS: Final = Path(__file__).parents[2] / "handlers"


def built_in(name: str) -> str:
    """Return the path of a handler's file; loading it reads the current settings."""
    return str(HANDLERS / f"{name}.py")


@dataclass
class Asked:
    """One request, as a server received it."""

    method: str
    path: str
    headers: dict[str, str]
    """Values by lower-case names."""
    body: bytes


Answer = tuple[int, dict[str, str], bytes]
OK: Final[Answer] = (200, {}, b"")


@dataclass
class Server:
    """A server that gives scripted answers in turn, and repeats the last one."""

    url: str
    answers: list[Answer]
    asked: list[Asked] = field(default_factory=list)

    def next(self) -> Answer:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@contextmanager
def serving(*answers: Answer) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            server.asked.append(Asked(self.command, self.path, headers, body))
            status, more, content = server.next()
            self.send_response(status)
            for name, value in {"content-length": str(len(content)), **more}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = answer  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{listening.server_port}/hook", list(answers))
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def waits(delivered: Delivered) -> float:
    """Return the seconds from the end of a delivery's last attempt to its retry."""
    due = delivered.delivery.due_at
    assert due is not None
    ended = delivered.delivery.history[-1]["ended_at"]
    return (datetime.fromisoformat(due) - datetime.fromisoformat(ended)).total_seconds()
