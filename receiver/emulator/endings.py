"""How a prediction ends: what it made, or why it made nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Failure = Literal["model", "moderated", "timeout", "prompt", "parameter"]


@dataclass(frozen=True, slots=True)
class Ending:
    """A failure with its words, or an output."""

    failure: Failure | None = None
    reason: str = ""
    """What the provider says of the failure; empty: its usual words."""
    output: tuple[Mapping[str, Any], ...] | str | None = None
    """Files, each with its `url`, or words; None: pictures drawn from the prompt."""
