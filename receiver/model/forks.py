"""Close inherited file descriptors in a forked child: locks, sockets, connections."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import Final

PRIVATE: Final[set[int]] = set()
"""File descriptors that are closed in every child process, such as that of a file lock."""
_FILES: Final = "/proc/self/fd"
_EPOLL: Final = "anon_inode:[eventpoll]"
_WATCHED: Final = re.compile(r"^tfd:\s*(\d+) .* ino:([0-9a-f]+)", re.MULTILINE)
"""A watched file: its number, and the inode, as the number may belong to another file now."""


def drop_private() -> None:
    """Close the private descriptors in a child: a file lock lasts as long as its descriptor."""
    _drop(PRIVATE)


def drop_watched() -> None:
    """Close in a child what its parent's event loops watch: listening sockets, connections.

    Linux lists all of them, those of libraries too; on other systems they stay open.
    """
    if not os.path.isdir(_FILES):  # noqa: PTH112 - a child should run little code
        return
    found: set[int] = set()
    for fd in map(int, os.listdir(_FILES)):  # noqa: PTH208
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
            if os.readlink(f"{_FILES}/{fd}") == _EPOLL:  # noqa: PTH115
                found |= {fd, *_watched_by(fd)}
    _drop(found)


def _watched_by(epoll: int) -> Iterator[int]:
    with open(f"/proc/self/fdinfo/{epoll}") as file:  # noqa: PTH123
        watched = _WATCHED.findall(file.read())
    for number, inode in watched:
        with contextlib.suppress(OSError):  # closed here, but open in another process
            if os.fstat(int(number)).st_ino == int(inode, 16):
                yield int(number)


def _drop(fds: Iterable[int]) -> None:
    """Replace files by /dev/null: their numbers stay in use, as objects here close them later."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in fds:
        if fd != null:
            os.dup2(null, fd, inheritable=False)
    os.close(null)


os.register_at_fork(after_in_child=drop_private)
