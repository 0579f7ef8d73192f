"""The emulated providers, and their interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final, Protocol

from starlette.routing import BaseRoute

from receiver.emulator.bfl import Bfl
from receiver.emulator.eachlabs import Eachlabs
from receiver.emulator.fal import Fal
from receiver.emulator.ideogram import Ideogram
from receiver.emulator.ledger import Prediction
from receiver.emulator.openrouter import OpenRouter
from receiver.emulator.options import Provider
from receiver.emulator.replicate import Replicate
from receiver.emulator.wavespeed import WaveSpeed
from receiver.emulator.world import World


class Emulated(Protocol):
    """An emulated provider."""

    settings: ClassVar[Mapping[str, str]]
    """Environment of a receiver: each value is a path below the emulator's URL, or a secret."""

    def routes(self) -> list[BaseRoute]: ...


class CallsBack(Emulated, Protocol):
    """A provider that calls back; all but Oxen do."""

    def __init__(self, world: World) -> None: ...

    def callback(self, prediction: Prediction) -> bytes:
        """Return the body of the callback for a prediction that has ended."""

    def headers(
        self, prediction: Prediction, body: bytes, at: float | None = None
    ) -> dict[str, str]:
        """Return the headers that prove a body, with the current time or `at`."""


CALLING: Final[Mapping[Provider, type[CallsBack]]] = {
    "eachlabs": Eachlabs,
    "fal": Fal,
    "replicate": Replicate,
    "ideogram": Ideogram,
    "bfl": Bfl,
    "wavespeed": WaveSpeed,
    "openrouter": OpenRouter,
}
