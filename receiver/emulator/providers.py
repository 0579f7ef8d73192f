"""The emulated providers that call back: all but Oxen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from receiver.emulator.bfl import Bfl
from receiver.emulator.eachlabs import Eachlabs
from receiver.emulator.emulated import CallsBack
from receiver.emulator.fal import Fal
from receiver.emulator.ideogram import Ideogram
from receiver.emulator.openrouter import OpenRouter
from receiver.emulator.options import Provider
from receiver.emulator.replicate import Replicate
from receiver.emulator.wavespeed import WaveSpeed

CALLING: Final[Mapping[Provider, type[CallsBack]]] = {
    each.name: each for each in (Eachlabs, Fal, Replicate, Ideogram, Bfl, WaveSpeed, OpenRouter)
}
