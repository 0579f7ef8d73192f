"""Close inherited file descriptors in a forked child: locks, sockets, connections."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from typing import Final

PRIVATE: Final[set[int]] = set()
"""File descriptors that no child of this process keeps, such as the one that holds a lock."""
_FILES: Final = "/proc/self/fd"
_EPOLL: Final = "anon_inode:[eventpoll]"
_WATCHED: Final = re.compile(r"^tfd:\s*(\d+) .* ino:([0-9a-f]+)", re.MULTILINE)
"""A file that is watched: its number, and which file had it then, as another may have it now."""


def drop_private() -> None:
    """Close in a child what it must not keep open: a file lock lasts as long as its descriptor."""
    _drop(PRIVATE)


def drop_watched() -> None:
    """Close in a child what event loops of its parent watch: listening sockets, connections.

    The system knows all of them, those of libraries too. Where it does not tell (it is Linux that
    does) they stay open.
    """
    if not os.path.isdir(_FILES):  # noqa: PTH112 - a child should run little code
        return
    found: set[int] = set()
    for fd in map(int, os.listdir(_FILES)):  # noqa: PTH208
        with contextlib.suppress(OSError):  # the listing's own is closed by now
            if os.readlink(f"{_FILES}/{fd}") == _EPOLL:  # noqa: PTH115
                found |= {fd, *_watched_by(fd)}
    _drop(found)


def _watched_by(epoll: int) -> Iterator[int]:
    with open(f"/proc/self/fdinfo/{epoll}") as file:  # noqa: PTH123
        watched = _WATCHED.findall(file.read())
    for number, inode in watched:
        with contextlib.suppress(OSError):  # it is closed, but another process has it open
            if os.fstat(int(number)).st_ino == int(inode, 16):
                yield int(number)


def _drop(fds: Iterable[int]) -> None:
    """Put /dev/null in their places: the numbers stay taken, as objects here will close them."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in fds:
        if fd != null:
            os.dup2(null, fd, inheritable=False)
    os.close(null)


os.register_at_fork(after_in_child=drop_private)
