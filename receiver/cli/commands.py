"""The program with all of its commands."""

from __future__ import annotations

from receiver.cli import change, look, operate, predict, run  # noqa: F401 - they declare its commands
from receiver.cli.program import main

__all__ = ["main"]
