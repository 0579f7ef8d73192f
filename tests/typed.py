"""A strict type check of files that a user writes."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.patience import PATIENCE

_CACHE: Final = Path(__file__).parent.parent / ".mypy_cache" / "pages"
"""Without a cache a check takes 10 seconds."""


def check_types(folder: Path) -> None:
    """Run mypy --strict, without a configuration, on all files of a folder."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "."]
    # One at a time: the cache is a SQLite file, and mypy fails if it is locked for 5 seconds.
    with _CACHE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ran = subprocess.run(
            [*command, f"--cache-dir={_CACHE}"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert ran.returncode == 0, ran.stdout + ran.stderr
