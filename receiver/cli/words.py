"""Arguments and options that several commands share, and the parsing of NAME=VALUE."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Final

import typer

from receiver.model.errors import ReceiverError

Handlers = Annotated[
    list[str] | None, typer.Argument(help="Files, modules or installed names (log, save, forward).")
]
Dev = Annotated[
    bool, typer.Option("--dev", help="For your own machine: make up secrets, read .env.")
]
Id = Annotated[
    str, typer.Argument(metavar="ID", help="The id, or enough of its beginning to be unique.")
]
Limit = Annotated[int, typer.Option(help="How many, newest first.", min=1)]
All = Annotated[bool, typer.Option("--all", help="List all of them.")]
Wide = Annotated[bool, typer.Option("--wide", help="Show all columns, whole ids and whole times.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one line each.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
OfProvider = Annotated[str | None, typer.Option("--provider", help="Only of this provider.")]
OfPrediction = Annotated[str | None, typer.Option("--prediction", help="Only of this prediction.")]
OfModel = Annotated[
    str | None, typer.Option("--model", help="Only of models that match this glob.")
]
LikeMetadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="NAME=GLOB", help="Only with metadata that matches."),
]
OfMetadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="NAME=VALUE", help="Only with this metadata."),
]

_PROSE: Final = ("prompt", "text")
"""Endings of the names of inputs whose values are text even if they look like JSON."""


def texts(words: Iterable[str] | None) -> dict[str, str]:
    """Parse NAME=VALUE; each value is text."""
    return dict(map(_split, words or ()))


def metadata_filter(words: Iterable[str] | None) -> dict[str, str]:
    """Parse NAME=VALUE into the query parameters of a list."""
    return {f"metadata.{name}": value for name, value in texts(words).items()}


def inputs(words: Iterable[str] | None) -> dict[str, Any]:
    """Parse NAME=VALUE, NAME=@FILE and NAME:=JSON; a VALUE may be JSON, but a prompt is text."""
    return dict(_pair(text, _guessed) for text in words or ())


def metadata(words: Iterable[str] | None) -> dict[str, Any]:
    """Parse NAME=VALUE and NAME:=JSON."""
    return dict(_pair(text, lambda _, value: value) for text in words or ())


def _pair(text: str, read: Callable[[str, str], Any]) -> tuple[str, Any]:
    name, value = _split(text)
    if not name.endswith(":"):
        return name, read(name, value)
    name = name.rstrip(":")
    found = _json(value)
    if found is None:
        raise ReceiverError(f"{name}:= must be JSON, and {value!r} is not")
    return name, found


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip(":"):
        raise ReceiverError(f"{text!r} is not NAME=VALUE")
    return name, value


def _guessed(name: str, value: str) -> Any:
    if name.endswith(_PROSE):
        return value
    if value.startswith("@@"):
        return value[1:]
    return _file(value[1:]) if value.startswith("@") else _json(value) or value


def _file(path: str) -> str:
    from receiver.client import ClientError, file

    try:
        return file(path)
    except ClientError as error:
        raise ReceiverError(str(error).removesuffix(": pass content_type=")) from error


def _json(text: str) -> Any:
    """Return JSON unparsed, so that numbers keep all their digits; None if it is not JSON."""
    import msgspec

    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None
    return msgspec.Raw(text.encode())
