"""A bounded folder of copies of outputs, by prediction, number and SHA-256.

What is of one prediction is one folder: it goes when the prediction is erased or deleted, and when
there is too much, the one that was not looked at for longest. Nothing here is needed: all of it can
be made again, as long as the provider or `save` has it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from receiver.settings import Settings

MOST_BYTES: Final = 512 * 1024 * 1024
_MOST_PLACES: Final = 5000
"""Predictions of which there may be copies: all of them are looked at again and again."""
_PREDICTION: Final = re.compile(r"pred_[0-9a-f]{32}")


def folder_of(settings: Settings) -> Path:
    """Return where the copies are: beside the database file, or among temporary files."""
    if settings.sqlite_path is not None:
        return Path(f"{settings.sqlite_path}.pictures")
    digest = hashlib.sha256(settings.database.encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"receiver-pictures-{os.getuid()}-{digest}"


class PictureCache:
    """Keeps copies in a folder, up to a number of bytes."""

    def __init__(self, folder: Path, most: int = MOST_BYTES) -> None:
        self._folder = folder
        self._most = most
        self._added = 0
        """Bytes that were added since the last look at all of them."""

    def open(self) -> None:
        """Make the folder, for us alone; or another, if it is another user's."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self._folder.lstat()
            if self._folder.is_symlink() or found.st_uid != os.getuid():
                raise PermissionError(self._folder)
        except OSError:
            self._folder = Path(tempfile.mkdtemp(prefix="receiver-pictures-"))

    def place(self, prediction: str) -> Path:
        """Return the folder of a prediction, which is made."""
        place = self._folder / prediction
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        return place

    def find(self, prediction: str, number: int, endings: Collection[str]) -> Path | None:
        """Return the copy that has one of some endings, and mark it as looked at."""
        place = self._folder / prediction
        for each in place.iterdir() if place.is_dir() else ():
            if each.name.startswith(f"{number}-") and each.suffix[1:] in endings:
                os.utime(place)
                return each
        return None

    def added(self, size: int) -> None:
        """Count what was added; drop what was not looked at for longest where it is too much."""
        self._added += size
        if self._added > self._most / 8:
            self.shrink()

    def shrink(self) -> None:
        """Drop what was not looked at for longest, until the rest is little enough."""
        self._added = 0
        sizes = {place: _size(place) for place in self._places()}
        total = sum(sizes.values())
        for place in sorted(sizes, key=_looked_at):
            if total <= self._most * 3 / 4 and len(sizes) <= _MOST_PLACES:
                return
            total -= sizes.pop(place)
            shutil.rmtree(place, ignore_errors=True)

    def predictions(self) -> list[str]:
        """Name the predictions of which there are copies."""
        return [place.name for place in self._places()]

    def drop(self, predictions: Iterable[str]) -> None:
        for name in predictions:
            if _PREDICTION.fullmatch(name):
                shutil.rmtree(self._folder / name, ignore_errors=True)

    def _places(self) -> list[Path]:
        try:
            return [each for each in self._folder.iterdir() if _PREDICTION.fullmatch(each.name)]
        except OSError:
            return []


def _size(place: Path) -> int:
    try:
        return sum(each.stat().st_size for each in place.iterdir())
    except OSError:  # it has just been dropped
        return 0


def _looked_at(place: Path) -> float:
    try:
        return place.stat().st_mtime
    except OSError:
        return 0.0
