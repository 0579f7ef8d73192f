"""The arguments of bots' calls: JSON, a form, a multipart form with files, or a query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from email import message_from_bytes
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from starlette.requests import Request

FORM = "application/x-www-form-urlencoded"
WRONG_SHAPE = (AttributeError, LookupError, TypeError, ValueError)
"""The errors of JSON whose shape is not the documented one."""


class Unreadable(Exception):
    """A body that cannot be parsed as its content type."""


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of a form."""

    name: str
    content_type: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Given:
    """The arguments of a call, and its files by the names of their fields."""

    args: dict[str, Any]
    files: Mapping[str, Upload] = field(default_factory=dict)
    document: Any = None
    """The JSON value of the body, of any type."""

    def text(self, name: str) -> str:
        """Return an argument as text; "" if it is missing, an object or a list."""
        value = self.args.get(name)
        return "" if value is None or isinstance(value, (dict, list)) else str(value)

    def flag(self, name: str) -> bool:
        return self.text(name).lower() in {"true", "1"}

    def value(self, name: str) -> Any:
        """Return an argument, decoded if it is a text; raise Unreadable if it is not JSON."""
        value = self.args.get(name)
        if not isinstance(value, str) or not value:
            return value
        try:
            return msgspec.json.decode(value)
        except msgspec.DecodeError:
            raise Unreadable(name) from None


async def read(request: Request) -> Given:
    """Return the arguments of a call; those in the body override those in the query."""
    query = dict(request.query_params)
    kind, body = request.headers.get("content-type", ""), await request.body()
    if kind.startswith("application/json"):
        found = read_json(body) if body else {}
        return Given(query | (found if isinstance(found, dict) else {}), document=found)
    if kind.startswith("multipart/form-data"):
        args, files = _parts(kind, body)
        return Given(query | args, files)
    pairs = parse_qsl(_text(body), keep_blank_values=True) if kind.startswith(FORM) else ()
    return Given(query | dict(pairs))


def read_json(body: bytes) -> Any:
    """Return the value of a JSON text; raise Unreadable if it is not JSON."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreadable(str(error)) from None


def _parts(kind: str, body: bytes) -> tuple[dict[str, Any], dict[str, Upload]]:
    boundary = str(
        message_from_bytes(f"content-type: {kind}\r\n\r\n".encode()).get_param("boundary", "")
    )
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode())
    if not boundary or len(pieces) < 2 or not pieces[-1].startswith(b"--"):  # noqa: PLR2004 - start, end
        raise Unreadable("the parts have no boundary or no end")
    args: dict[str, Any] = {}
    files: dict[str, Upload] = {}
    for piece in pieces[1:-1]:
        head, _, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        headers = message_from_bytes(head + b"\r\n\r\n")
        name = str(headers.get_param("name", "", "content-disposition"))
        filename = headers.get_filename()
        if filename is None:
            args[name] = _text(content)
        else:
            given = headers.get("content-type", "")
            files[name] = Upload(filename, str(given).partition(";")[0], content)
    return args, files


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(str(error)) from None
