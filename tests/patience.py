"""How long a test waits for what must come: one number for all of them."""

from typing import Final

PATIENCE: Final = 60.0
"""Seconds; more than the slowest machine needs on which the tests are to pass."""
