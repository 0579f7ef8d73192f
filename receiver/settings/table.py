"""A settings table: the fields of a class, each declared with its variable and description."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from typing import Any, Final, Generic, NamedTuple, TypeVar

from receiver.settings.parsers import one_of
from receiver.settings.reader import Reader

T = TypeVar("T")
D = TypeVar("D")

_ROW: Final = "setting"
"""The key of a field's line in its metadata."""


class Setting(NamedTuple):
    """One line of the table."""

    names: tuple[str, ...]
    """Environment variables; `{}` stands for a provider's prefix."""
    parse: Callable[[str], Any] | None
    """Parses a text, or raises ValueError; None: `read` reads and parses."""
    default: Any
    doc: str
    """The description, in Markdown."""
    shown: str = ""
    """The default in words, if its value is not readable."""
    read: Callable[[Reader], Any] | None = None

    @property
    def default_shown(self) -> str:
        """The default in Markdown."""
        if self.shown:
            return self.shown
        match self.default:
            case bool():
                return "on" if self.default else "off"
            case int() | float():
                return f"{self.default:.0f}"
            case str():
                return f"`{self.default}`"
        return "none"

    def value(self, reader: Reader) -> Any:
        """Return the value that is set; the default if there is none, or if it is wrong."""
        if self.parse is None:
            return self.read(reader) if self.read else None
        return reader.get(self.names[0], self.parse, self.default)


class _Declared(Generic[T]):
    """A line of the table that still lacks its description."""

    def __init__(self, row: Setting, *, is_secret: bool = False) -> None:
        self._row = row
        self._is_secret = is_secret

    def doc(self, text: str) -> T:
        """Return the field, with the description of its line."""
        row = self._row._replace(doc=text)
        made: Any = field(
            default_factory=lambda: row.default, repr=not self._is_secret, metadata={_ROW: row}
        )
        return made  # type: ignore[no-any-return] # the dataclass makes of it what it stands for


def setting(
    name: str, parse: Callable[[str], T], default: D, *, shown: str = "", is_secret: bool = False
) -> _Declared[T | D]:
    """Declare a field that one variable sets; `is_secret` keeps it out of `repr`."""
    return _Declared(Setting((name,), parse, default, "", shown), is_secret=is_secret)


def choice(name: str, words: Sequence[str], default: Any, *, shown: str = "") -> _Declared[Any]:
    """Declare a field whose value is one of these words."""
    return _Declared(Setting((name,), one_of(*words), default, "", shown))


def composed(
    names: tuple[str, ...], read: Callable[[Reader], T], default: D, *, shown: str = ""
) -> _Declared[T | D]:
    """Declare a field that several variables set together."""
    return _Declared(Setting(names, None, default, "", shown, read))


def read_rows(table: type, reader: Reader) -> dict[str, Any]:
    """Return the values of a class's fields that have a line in its table."""
    return {at: row.value(reader) for at, row in rows(table).items()}


def rows(table: type) -> Mapping[str, Setting]:
    """Return the lines of a class's table, by field."""
    return {each.name: each.metadata[_ROW] for each in fields(table) if _ROW in each.metadata}
