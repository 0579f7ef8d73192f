"""The table of all providers, one line each; deploy/providers.md describes how to add one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from receiver.providers import bfl, eachlabs, fal, ideogram, openrouter, oxen, replicate, wavespeed
from receiver.providers.declared import Declared

DECLARED: Final[Mapping[str, Declared]] = {
    "oxen": oxen.DECLARED,
    "eachlabs": eachlabs.DECLARED,
    "fal": fal.DECLARED,
    "replicate": replicate.DECLARED,
    "ideogram": ideogram.DECLARED,
    "bfl": bfl.DECLARED,
    "wavespeed": wavespeed.DECLARED,
    "openrouter": openrouter.DECLARED,
}

NAMES: Final = tuple(DECLARED)
