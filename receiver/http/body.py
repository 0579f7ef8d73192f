"""Request parsing: bodies with limits on size and time, parameters, headers."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from typing import Any, Final, TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive, Scope

from receiver.model.errors import Problem

_LONGEST_WAIT: Final = 60.0
_WHOLE: Final = re.compile(r"[0-9]{1,9}", re.ASCII)

Asked = TypeVar("Asked", bound=msgspec.Struct)


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of a route that has none."""


class Disconnected(Exception):
    """The sender went away in the middle of its request."""


class TooLarge(Exception):
    """A body has more bytes than its limit."""


class TooSlow(Exception):
    """A body comes more slowly than it must."""


_GRACE: Final = 10.0
_PACE: Final = 1024
"""A body may take 10 seconds, and one more for each KiB that has come, …"""
SLOWEST: Final = 60.0
"""… but at most 60 seconds in all; providers give up earlier."""


async def read_body(scope: Scope, receive: Receive, most: int, *, keep: bool = True) -> bytes:
    """Return a request's body; raise TooLarge at the first byte above `most`.

    A body whose Content-Length is larger is refused before it is read, so that a sender that waits
    for `100 Continue` does not send it. Raises TooSlow for a body that is too slow, and
    Disconnected. Without `keep` it is only counted: a stranger's bytes need no memory.
    """
    if _announced(scope["headers"]) > most:
        raise TooLarge
    chunks: list[bytes] = []
    size = 0
    begun = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout_at(begun + _GRACE) as patience:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Disconnected
                chunk = message.get("body", b"")
                size += len(chunk)
                if size > most:
                    raise TooLarge
                if keep or not chunks:
                    chunks.append(chunk)
                if not message.get("more_body", False):
                    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
                patience.reschedule(begun + min(_GRACE + size / _PACE, SLOWEST))
    except TimeoutError:
        raise TooSlow from None


def _announced(headers: Iterable[tuple[bytes, bytes]]) -> int:
    """Return the Content-Length of a body; 0 if it is not given."""
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])  # 20 digits are above any limit already
    return 0


async def whole_body(request: Request, most: int) -> bytes:
    """Return a request's body; raise Problem, or HTTPException if the sender disconnects."""
    try:
        return await read_body(request.scope, request.receive, most)
    except TooSlow:
        raise Problem(408, "too-slow", "the body came too slowly") from None
    except TooLarge:
        raise Problem(413, "too-large", f"more than {most} bytes") from None
    except Disconnected:
        raise HTTPException(499) from None


def prefer_wait(preferences: str) -> float | None:
    """Return the seconds of `Prefer: wait=N` (RFC 7240), or None; all else is ignored."""
    for preference in preferences.lower().split(","):
        name, _, value = preference.partition(";")[0].strip().partition("=")
        if name.strip() == "wait":
            digits = value.strip().strip('"') or "60"
            if digits.isdecimal() and digits.isascii():
                return min(max(float(digits), 1.0), _LONGEST_WAIT)
    return None


def json_body(body: bytes, kind: type[Asked]) -> Asked:
    """Return a decoded JSON body; raise Problem if it is not JSON or not of its type."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise Problem(422, "invalid-request", validation_message(kind, str(error))) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Problem(400, "invalid-json", "the body is not JSON") from error


def query_parameters(request: Request, kind: type[Asked], apart: str | None) -> Asked:
    """Return the query as a struct; raise Problem for unknown or repeated parameters.

    Parameters whose names begin with `apart` are left to `prefixed_parameters`.
    """
    given = request.query_params.multi_items()
    values = dict(given)
    if len(values) < len(given):
        [(twice, _), *_] = Counter(name for name, _ in given).most_common(1)
        raise Problem(422, "invalid-request", f"{twice} is given twice")
    kept = {name: text for name, text in values.items() if not (apart and name.startswith(apart))}
    return _read(kept, kind)


def prefixed_parameters(request: Request, prefix: str) -> dict[str, str]:
    """Return the query parameters that begin with a prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): text
        for name, text in request.query_params.items()
        if name.startswith(prefix)
    }


def header_parameters(request: Request, kind: type[Asked]) -> Asked:
    """Return the headers that a struct describes; other headers are ignored."""
    values = {}
    for name in kind.__struct_encode_fields__:
        if given := dict.fromkeys(request.headers.getlist(name)):
            values[name] = ", ".join(given)  # as RFC 9110 combines repeated headers
    return _read(values, kind)


def path_parameter(request: Request, name: str, kind: Any, refusal: Problem) -> str:
    """Return a path parameter; raise `refusal` if it is not of its type."""
    text: str = request.path_params[name]
    if text.endswith("\n"):
        raise refusal
    try:
        return msgspec.convert(text, kind)  # type: ignore[no-any-return]
    except msgspec.ValidationError:
        raise refusal from None


def _read(values: Mapping[str, str], kind: type[Asked]) -> Asked:
    for name, text in values.items():
        if text.endswith("\n"):  # in Python only, `$` also matches before it
            raise Problem(422, "invalid-request", f"{name}: it ends with a line break")
        if text not in _words(kind).get(name, (text,)):
            raise Problem(422, "invalid-request", validation_message(kind, f" - at `$.{name}`"))
    numbers = _numbers(kind)
    given = {
        name: int(text) if name in numbers and _WHOLE.fullmatch(text) else text
        for name, text in values.items()
    }
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise Problem(422, "invalid-request", validation_message(kind, str(error))) from None


@cache
def _numbers(kind: type[msgspec.Struct]) -> frozenset[str]:
    """Return the names of the fields that are integers."""
    schemas = schema_of(kind)["properties"].items()
    return frozenset(name for name, schema in schemas if schema.get("type") == "integer")


@cache
def _words(kind: type[msgspec.Struct]) -> dict[str, Collection[str]]:
    """Return the allowed words of the fields with an enum, which their types may not enforce."""
    schemas = schema_of(kind)["properties"].items()
    return {name: schema["enum"] for name, schema in schemas if "enum" in schema}


def schema_of(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the JSON Schema of a struct of plain fields; an optional one's null is left out."""
    (_,), schemas = msgspec.json.schema_components([kind])
    schema: dict[str, Any] = schemas[kind.__name__]
    for name, field in schema["properties"].items():
        [bare, *_] = field.get("anyOf", [field])
        if "$ref" in bare:
            bare = schemas[bare["$ref"].rpartition("/")[2]]
        kept = {"default": field["default"]} if field.get("default") is not None else {}
        schema["properties"][name] = {**bare, **kept}
    return schema


def validation_message(kind: type[msgspec.Struct], message: str) -> str:
    """Return an error message that states what a field of a struct must be."""
    message, _, place = message.partition(" - at `$.")
    name = place.rstrip("`")
    schema = schema_of(kind)["properties"].get(name, {})
    if "enum" in schema:
        return f"{name} must be one of {', '.join(schema['enum'])}"
    if "maximum" in schema:
        return f"{name} must be {schema['minimum']} to {schema['maximum']}"
    if "pattern" in schema:
        return f"{name} must be like {', '.join(schema.get('examples', [schema['pattern']]))}"
    return f"{name}: {message}" if name else message
