"""The command line: run a receiver, or look at one that runs."""

from __future__ import annotations

from receiver.cli import look, mend, operate, predict, run  # noqa: F401 - they declare its commands
from receiver.cli.program import main

__all__ = ["main"]
