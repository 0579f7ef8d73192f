"""Helpers for tests of chat handlers: a strict service on loopback, and results to fetch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email import message_from_bytes
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl

from receiver import Context, Event, Output, Stored, on
from receiver.testing import Delivered, Kit
from tests.handlers.parts import Answer, Asked
from tests.handlers.services import service

S = TypeVar("S", bound="Service")
Kits = Callable[..., Kit]

PNG: Final = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
GIF: Final = b"GIF89a" + bytes(64)
MP4: Final = b"\0\0\0\x18ftypmp42" + bytes(range(256))
MP3: Final = b"ID3\x04" + bytes(64)
PDF: Final = b"%PDF-1.7\n" + bytes(64)
NASTY: Final = (
    "<!channel> @everyone <@U1> *b* `c` [d](https://evil.example) & \\ \r\n\N{PILE OF POO}" * 90
)


@dataclass
class Part:
    """One part of a form."""

    name: str
    filename: str | None
    content: bytes


class Service:
    """Base of an emulated platform: it answers as documented, and serves results."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.results: dict[str, bytes] = {}
        """Files by path."""
        self.is_fleeting = False
        """Whether a result can be fetched only once."""
        self.asked: list[Asked] = []
        self.refusals: list[Answer | None] = []
        """Answers to the next requests, which are then not processed; None for a real answer."""
        self.lost: list[Answer] = []
        """Answers to the next requests, which are processed, in place of the real answers."""

    def put(self, name: str, content: bytes) -> str:
        self.results[f"/results/{name}"] = content
        return f"{self.url}/results/{name}"

    def answer(self, asked: Asked) -> Answer:
        if asked.method == "GET":
            take = self.results.pop if self.is_fleeting else self.results.get
            found = take(asked.path, None)
            return (404, {}, b"gone") if found is None else (200, {}, found)
        self.asked.append(asked)
        if self.refusals and (refusal := self.refusals.pop(0)):
            return refusal
        answer = self.speak(asked)
        return self.lost.pop(0) if self.lost else answer

    def speak(self, asked: Asked) -> Answer:
        raise NotImplementedError


@contextmanager
def speaking(kind: type[S]) -> Iterator[S]:
    """Run a service; a request that it does not expect fails the test."""
    found: list[S] = []

    def answer(asked: Asked) -> Answer:
        return found[0].answer(asked)

    with service(answer) as url:
        found.append(kind(url))
        yield found[0]


def parts_of(asked: Asked) -> list[Part]:
    """Parse a multipart form."""
    kind, _, boundary = asked.headers["content-type"].partition("; boundary=")
    assert kind == "multipart/form-data", kind
    first, *pieces, last = asked.body.split(b"--" + boundary.encode())
    assert (first, last) == (b"", b"--\r\n")
    return [_part(piece) for piece in pieces]


def _part(piece: bytes) -> Part:
    head, _, content = piece.removeprefix(b"\r\n").removesuffix(b"\r\n").partition(b"\r\n\r\n")
    headers = message_from_bytes(head)
    said: dict[str, Any] = dict(headers.get_params(header="content-disposition") or [])
    assert "form-data" in said
    return Part(said["name"], said.get("filename"), content)


def fields_of(asked: Asked) -> dict[str, str]:
    """Parse a form without files."""
    assert asked.headers["content-type"] == "application/x-www-form-urlencoded"
    pairs = parse_qsl(asked.body.decode(), keep_blank_values=True, strict_parsing=True)
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def note(delivered: Delivered, handler: str) -> str:
    """Return the note of the last attempt."""
    return str(delivered.deliveries[handler].history[-1]["note"])


KEPT: Final = "https://kept.example/black.png"


@on("succeeded", name="save")
async def keeping(event: Event, ctx: Context) -> None:
    """Stand in for `save`: record the result as saved and flagged all black."""
    first: Output = (event.prediction.output or [])[0]
    assert first.url
    stored = Stored(url=KEPT, sha256="0", size=1, content_type="image/png", flagged="all_black")
    await ctx.record_stored(0, stored)
