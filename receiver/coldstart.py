"""What serves and works, imported without what only terminals need.

httpx and structlog import rich, pygments and click if they are there, for a command line and for
tracebacks in colour: a fifth of what it costs to start. Code that needs them imports them later.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Hide modules that were not imported yet, as if they were not installed."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None: there is none
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with _without("rich", "click", "pygments"):
    from receiver.app import create_app, drain, migrate, work

__all__ = ["create_app", "drain", "migrate", "work"]
