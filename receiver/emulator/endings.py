"""The ending of a prediction: its output, or its failure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Failure = Literal["model", "moderated", "timeout", "prompt"]


@dataclass(frozen=True, slots=True)
class Ending:
    """A failure with its reason, or an output."""

    failure: Failure | None = None
    reason: str = ""
    """The provider's message about the failure; empty: its usual one."""
    output: tuple[Mapping[str, Any], ...] | str | None = None
    """Files, each with its `url`, or a text; None: pictures drawn from the prompt."""
