"""Settings of handlers: declared in the handler's file, read from the environment."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, Self, TypeVar, cast
from urllib.parse import urlsplit

from receiver.deliveries.template import Template
from receiver.model.errors import HandlerError
from receiver.model.recipes import TRUTHS
from receiver.settings import Reader, Secret
from receiver.settings import seconds as parse_seconds
from receiver.settings.proxies import is_loopback
from receiver.settings.toml import Table, read_file

T = TypeVar("T")


class read_settings:  # noqa: N801 - used like a function
    """Read a handler's settings, and report all wrong ones at once.

        with read_settings() as read:
            URL = read.url("SHOP_URL", "the address that receives orders")
            TOKEN = read.secret("SHOP_TOKEN", "a key from the shop's admin pages")
            MAX_BYTES = read.size("SHOP_MAX_BYTES", "the largest picture", default="8MB")

    Each method takes the name, a description, and the default as text; a setting without a default
    is required. Blanks, line ends and a pair of quotes around a value are removed: some env files
    keep them. At its end the block raises a HandlerError with a line for every problem; no line
    quotes a secret.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._reader = Reader(os.environ if env is None else env)
        self._is_open = False

    def __enter__(self) -> Self:
        self._is_open = True
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> None:
        self._is_open = False
        # An error within the block is most likely due to a setting that could not be read.
        if self._reader.problems and isinstance(error, Exception | None):
            raise HandlerError("\n".join(self._reader.problems)) from error

    def parsed(
        self, name: str, says: str, parse: Callable[[str], T], *, default: str | None = None
    ) -> T:
        """Read a setting by a function that raises ValueError with what the value must be."""
        if not self._is_open:
            raise HandlerError(f"{_place()}{name} is to be read within `with read_settings() as …`")
        if not isinstance(default, str | None):
            raise HandlerError(f"{_place()}the default of {name} must be a text, not {default!r}")
        value = self._reader.get(name, parse, None, as_text=default, says=says, at=_place())
        return cast("T", value)  # None only if there is a problem, which the block then raises

    def refuse(self, problem: str) -> None:
        """Add a problem of settings that do not fit together."""
        self._reader.problems.append(f"{_place()}{problem}")

    def text(self, name: str, says: str, *, default: str | None = None) -> str:
        return self.parsed(name, says, str, default=default)

    def matching(self, name: str, says: str, pattern: str, *, default: str | None = None) -> str:
        """Read a text that must match a regular expression (ASCII) as a whole."""

        def parse(text: str) -> str:
            if text and not re.fullmatch(pattern, text, re.ASCII):
                raise ValueError(f"must be {says}")  # a secret may have been pasted here
            return text

        return self.parsed(name, says, parse, default=default)

    def secret(
        self, name: str, says: str, pattern: str = r"[!-~]+", *, default: str | None = None
    ) -> Secret:
        """Read a secret that no log shows; it must fit into a header unless `pattern` is wider."""
        return self.parsed(name, says, lambda text: _secret(text, pattern, says), default=default)

    def tables(self, name: str, says: str) -> dict[str, Table]:
        """Read a TOML file that a setting names: its tables by name.

        Problems in the tables are reported with those of the other settings.
        """
        path = self.text(name, says)
        whole = read_file(path, name, self._reader.problems) if path else None
        if whole is not None and not whole.keys():
            whole.refuse("it declares nothing")
        return {} if whole is None else whole.other_tables()

    def size(self, name: str, says: str, *, default: str | None = None) -> int:
        """Read a number of bytes, such as 8000000, 8MB or 8MiB."""
        return self.parsed(name, says, _size, default=default)

    def whole(self, name: str, says: str, *, default: str | None = None) -> int:
        return self.parsed(name, says, _whole, default=default)

    def seconds(self, name: str, says: str, *, default: str | None = None) -> float:
        return self.parsed(name, says, parse_seconds, default=default)

    def switch(self, name: str, says: str, *, default: str = "0") -> bool:
        return TRUTHS[self.choice(name, says, *TRUTHS, default=default)]

    def choice(self, name: str, says: str, *words: str, default: str | None = None) -> str:
        return self.parsed(name, says, lambda text: _choice(text, words), default=default)

    def template(
        self, name: str, says: str, *, default: str | None = None, more: tuple[str, ...] = ()
    ) -> Template:
        return self.parsed(name, says, lambda text: Template(text, more), default=default)

    def url(self, name: str, says: str, *, default: str | None = None, secure: bool = False) -> str:
        """Read an http(s) URL.

        `secure`: the root of an API that gets secrets. It must be https or on this machine, and is
        returned without a slash at its end.
        No problem quotes the URL: its user or query may be secret.
        """
        return self.parsed(name, says, lambda text: _url(text, secure=secure), default=default)


def is_on(text: str) -> bool:
    """Return whether the text of a switch means yes."""
    return TRUTHS.get(text.strip().lower(), False)


_UNITS: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d{1,15})([kmg]i?b|b?)", text, re.ASCII | re.IGNORECASE)
    if not found or not int(found[1]):
        raise ValueError(f"must be a number of bytes, as 8000000, 8MB or 8MiB, not {text[:40]!r}")
    return int(found[1]) * _UNITS[found[2].lower()]


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise ValueError(f"must be a whole number up to 999999999, not {text[:40]!r}")
    return int(text)


def _secret(text: str, pattern: str, says: str) -> Secret:
    if text and not re.fullmatch(pattern, text, re.ASCII):
        raise ValueError(f"must be whole, on one line, without blanks and quotes: {says}")
    return Secret(text)


def _choice(text: str, words: tuple[str, ...]) -> str:
    if text.lower() not in words:
        raise ValueError(f"must be one of {', '.join(words)}, not {text[:40]!r}")
    return text.lower()


def _url(text: str, *, secure: bool) -> str:
    if not text or _fits(text, secure=secure):
        return text.rstrip("/") if secure else text
    must = "must be an address that starts with"
    if secure:
        raise ValueError(f"{must} https://, with neither user, query, blanks nor quotes")
    raise ValueError(f"{must} https:// or http://, without blanks and quotes")


def _fits(text: str, *, secure: bool) -> bool:
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
        sendable = bool(host) and parts.port != 0 and bool(re.fullmatch(r"[!#-&(-;=?-~]+", text))
    except ValueError:
        return False
    if secure and ("@" in parts.netloc or parts.query or parts.fragment):
        return False
    schemes = {"https"} if secure and not is_loopback(host) else {"http", "https"}
    return sendable and parts.scheme in schemes


def _place() -> str:
    """Return the file and line of the handler that called this module."""
    frame = sys._getframe(1)  # noqa: SLF001 - the one cheap way to name the caller
    while frame.f_code.co_filename == __file__ and frame.f_back:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}: "
