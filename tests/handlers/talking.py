"""Helpers for tests of orders from chats: recipes, a kit with emulated chats, direct calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx

from receiver.emulator.inprocess import EmulatedChats
from receiver.model.values import Prediction
from receiver.testing import Kit
from receiver.testing.chat import CHATS, SETTINGS
from tests.handlers.parts import built_in
from tests.receiving import Station

Kits = Callable[..., Kit]
RECIPES: Final = {
    "RECEIVER_RECIPES": str(Path(__file__).parent / "recipes.toml"),
    "RECEIVER_LIMIT_UNPROVED_PER_MINUTE": "none",
}
PNG: Final = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


def talking(kits: Kits, handler: str, **more: Any) -> Kit:
    return kits(built_in(handler), chats=True, settings=RECIPES, **more)


def predictions(kit: Kit) -> list[Prediction]:
    """Return all predictions, the oldest first."""
    found = kit.get("/v1/predictions?limit=100", dict[str, Any])["data"]
    return [kit.get(f"/v1/predictions/{one['id']}", Prediction) for one in reversed(found)]


def rejected(kit: Kit) -> list[str]:
    """Return the reasons of the calls that were discarded as rejected."""
    found = kit.get("/v1/discarded?kind=rejected", dict[str, Any])["data"]
    return [one["reason"] for one in found]


def accounts(monkeypatch: Any, **more: str) -> None:
    """Set the environment variables of the emulated accounts."""
    for name, value in {**SETTINGS, **more}.items():
        monkeypatch.setenv(name, value)


async def call(
    station: Station, path: str, body: bytes, headers: Mapping[str, str]
) -> httpx.Response:
    return await station.world.post(path, content=body, headers=headers)


async def four_times(
    station: Station, path: str, body: bytes, headers: Mapping[str, str]
) -> list[int]:
    """Send the same call four times at once; return the statuses."""
    answers = await asyncio.gather(*[call(station, path, body, headers) for _ in range(4)])
    return [answer.status_code for answer in answers]


ODD: Final[tuple[Any, ...]] = (
    None,
    True,
    -1,
    1.5,
    10**400,
    "",
    "\0",
    "x" * 20_000,
    [],
    {},
    [None],
    [{}],
)


def spoilt(value: Any) -> Iterator[Any]:
    """Yield copies of a JSON value in which one part, at any depth, is missing or invalid."""
    if isinstance(value, dict):
        for name, part in value.items():
            yield {key: each for key, each in value.items() if key != name}
            yield from ({**value, name: each} for each in (*ODD, *spoilt(part)))
    elif isinstance(value, list):
        yield from ([each] for part in value for each in (*ODD, *spoilt(part)))


def nowhere() -> EmulatedChats:
    """Return emulated chats that send nothing by themselves and record what a receiver sends."""
    return EmulatedChats("https://hooks.test", CHATS)
