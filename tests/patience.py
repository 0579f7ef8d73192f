"""How long a test waits for something that must happen: one number for all tests."""

from typing import Final

PATIENCE: Final = 60.0
"""Seconds; more than the slowest supported machine needs."""
