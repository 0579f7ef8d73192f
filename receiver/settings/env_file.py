"""The file `.env` of a working folder, which development reads; the environment has precedence."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from receiver.model.errors import SettingsError

NAME: Final = ".env"
_LONGEST: Final = 1024 * 1024


def merged(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment, with missing variables from `.env` of the working folder.

    Raises SettingsError if other users may have written the file, or if it is not valid.
    """
    return {**read(Path(NAME)), **env}


def read(path: Path) -> dict[str, str]:
    """Read the variables that a file sets, none without a file; values are not expanded.

    The file can name handlers, which are programs, so other users must not be able to write it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO must not block
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise SettingsError([f"{path} cannot be read: {error.strerror}"]) from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise SettingsError([f"{path} is not a file"])
        if found.st_uid not in {os.geteuid(), 0}:
            raise SettingsError([f"{path} belongs to another user: remove it, or chown it"])
        if found.st_mode & stat.S_IWOTH:
            raise SettingsError([f"{path} can be written by everyone: chmod 600 {path}"])
        content = file.read(_LONGEST + 1)
    return _parsed(path, content)


def _parsed(path: Path, content: bytes) -> dict[str, str]:
    from dotenv import dotenv_values  # noqa: PLC0415 - paid for when there is such a file

    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SettingsError([f"{path} is not UTF-8"]) from None
    if len(content) > _LONGEST or "\0" in text:
        raise SettingsError([f"{path} is not a list of settings"])
    found = dotenv_values(stream=io.StringIO(text), interpolate=False)
    return {name: value for name, value in found.items() if name and value is not None}


def is_open(path: Path = Path(NAME)) -> bool:
    """Return whether other users may read the file."""
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False
