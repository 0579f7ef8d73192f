"""A bounded cache of outputs in a folder, by prediction, number and SHA-256.

The copies of one prediction are in one folder. It is removed when the prediction is erased or
deleted, or when there is too much and it was not viewed for longest. All copies can be made again,
as long as the provider or `save` has the outputs.
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
"""Maximum number of predictions with copies: all of them are checked again and again."""
_PREDICTION: Final = re.compile(r"pred_[0-9a-f]{32}")


def folder_of(settings: Settings) -> Path:
    """Return the folder of the copies: beside the database file, or among temporary files."""
    if settings.sqlite_path is not None:
        return Path(f"{settings.sqlite_path}.pictures")
    digest = hashlib.sha256(settings.database.encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"receiver-pictures-{os.getuid()}-{digest}"


class PictureCache:
    """The copies in a folder, up to a number of bytes."""

    def __init__(self, folder: Path, most: int = MOST_BYTES) -> None:
        self._folder = folder
        self._most = most
        self._added = 0
        """Bytes that were added since the last `shrink`."""

    def open(self) -> None:
        """Create the folder, for our user only; or a temporary one, if it is another user's."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self._folder.lstat()
            if self._folder.is_symlink() or found.st_uid != os.getuid():
                raise PermissionError(self._folder)
            self._folder.chmod(0o700)  # it may be older than this rule
        except OSError:
            self._folder = Path(tempfile.mkdtemp(prefix="receiver-pictures-"))

    def place(self, prediction: str) -> Path:
        """Create the folder of a prediction, and return it."""
        place = self._folder / prediction
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        return place

    def find(self, prediction: str, number: int, endings: Collection[str]) -> Path | None:
        """Return the copy that has one of these endings, or None; mark it as viewed."""
        place = self._folder / prediction
        for each in place.iterdir() if place.is_dir() else ():
            if each.name.startswith(f"{number}-") and each.suffix[1:] in endings:
                os.utime(place)
                return each
        return None

    def added(self, size: int) -> None:
        """Count added bytes; `shrink` after every eighth of the limit."""
        self._added += size
        if self._added > self._most / 8:
            self.shrink()

    def shrink(self) -> None:
        """Remove the folders not viewed for longest, down to three quarters of the limit."""
        self._added = 0
        sizes = {place: _size(place) for place in self._places()}
        total = sum(sizes.values())
        for place in sorted(sizes, key=_looked_at):
            if total <= self._most * 3 / 4 and len(sizes) <= _MOST_PLACES:
                return
            total -= sizes.pop(place)
            shutil.rmtree(place, ignore_errors=True)

    def predictions(self) -> list[str]:
        """Return the ids of the predictions with copies."""
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
    except OSError:  # it was just removed
        return 0


def _looked_at(place: Path) -> float:
    try:
        return place.stat().st_mtime
    except OSError:
        return 0.0
