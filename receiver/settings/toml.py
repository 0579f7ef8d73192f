"""Tables of a TOML file, read key by key; every problem is collected, with its table and key."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from receiver.model.costs import micro
from receiver.model.text import did_you_mean

T = TypeVar("T")
D = TypeVar("D")

files_read: Final[set[Path]] = set()
"""Files that this process has read or tried to read; development watches them."""
_PLACE: Final = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)")


def read_file(path: str, name: str, problems: list[str]) -> Table | None:
    """Read the file that a setting names; None if it names none or, with a problem, if it fails."""
    if not path:
        return None
    import tomllib  # noqa: PLC0415 - paid for if there is such a file

    files_read.add(Path(path).absolute())
    content = ""
    try:
        content = Path(path).read_text("utf-8-sig")
        found = tomllib.loads(content)
    except OSError as error:
        problems.append(f"{name}: {path} cannot be read: {error.strerror}")
    except UnicodeDecodeError:
        problems.append(f"{name}: {path} is not text in UTF-8: save it as that")
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one
        problems.append(f"{name}: {path}{_not_toml(str(error), content)}")
    else:
        return Table(found, f"{name}: {path}", problems)
    return None


def _not_toml(error: str, content: str) -> str:
    """Return where and why a text is not TOML, as `:line:column: …`, from the parser's message."""
    match = _PLACE.fullmatch(error)
    if match is None:
        return f" is not TOML: {error}"
    lines = content.split("\n")
    line, column = match[2] or len(lines), match[3] or len(lines[-1]) + 1
    return f":{line}:{column}: not TOML: {match[1]}"


class Table:
    """One table of the file: it returns the values of its keys, and collects problems."""

    def __init__(
        self, found: Mapping[str, Any], place: str, problems: list[str], name: str = ""
    ) -> None:
        self._found = found
        self._place = place
        self._problems = problems
        self._name = name
        """The name in brackets; empty for the whole file, and for items of an array."""
        self._known: list[str] = []

    def take(self, key: str, read: Callable[[Any], T], default: D) -> T | D:
        """Return the value of a key; the default if it is missing or wrong."""
        self._known.append(key)
        if key not in self._found:
            return default
        try:
            return read(self._found[key])
        except ValueError as error:
            for problem in error.args:  # a template may have several
                self.refuse(f"{key} {problem}")
            return default

    def need(self, key: str, read: Callable[[Any], T], default: T) -> T:
        """Return the value of a required key."""
        if key not in self._found:
            self.refuse(f"{key} is missing")
        return self.take(key, read, default)

    def text(self, key: str, default: str | None = None) -> str:
        """Return the text of a key, which is required unless there is a default."""
        return self.need(key, text, "") if default is None else self.take(key, text, default)

    def choice(self, key: str, words: Collection[str], default: str | None = None) -> str:
        """Return the word of a key; another than these is refused, with the nearest of them."""
        read, first = one_of(words), next(iter(words))
        return self.need(key, read, first) if default is None else self.take(key, read, default)

    def seconds(self, key: str, default: float) -> float:
        return self.take(key, positive, default)

    def tables(self, key: str) -> dict[str, Table]:
        """Return the tables inside a key, by name."""
        inside = self.table(key)
        return inside._inside(inside._found, f"{inside._name}.")  # noqa: SLF001 - the same class

    def table(self, key: str) -> Table:
        """Return the table of a key, or an empty one."""
        found: Mapping[str, Any] = self.take(key, mapping, {})
        return self._inside({key: found}, f"{self._name}.")[key]

    def keys(self) -> list[str]:
        return list(self._found)

    def other_tables(self) -> dict[str, Table]:
        """Return the tables that were not taken yet, by name."""
        return self._inside(self._left(), "")

    def _inside(self, found: Mapping[str, Any], before: str) -> dict[str, Table]:
        file = self._place.removesuffix(f", [{self._name}]")
        made = {}
        for name, value in found.items():
            at = f"{before}{name}"
            if isinstance(value, dict):
                made[name] = Table(value, f"{file}, [{at}]", self._problems, at)
            else:
                self.refuse(f"{name} must be a table, [{at}]")
        return made

    def list_of(self, key: str) -> list[Table]:
        """Return the tables of an array, `[[key]]`."""
        found: list[Any] = self.take(key, tables_in, [])
        return [
            Table(each, f"{self._place}, [[{key}]] number {number}", self._problems)
            for number, each in enumerate(found, 1)
        ]

    def has(self, key: str) -> bool:
        return key in self._found

    def end(self) -> None:
        """Refuse unknown keys."""
        for name in self._left():
            self.refuse(f"{name}: there is no such key{did_you_mean(name, self._known)}")

    def _left(self) -> Mapping[str, Any]:
        return {name: value for name, value in self._found.items() if name not in self._known}

    def refuse(self, problem: str) -> None:
        self._problems.append(f"{self._place}: {problem}")


# --- parsers: each returns a value, or raises ValueError that states what it must be ---


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text in quotes")  # noqa: TRY004 - a problem of a file
    return value.strip()


def mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("must be a table")  # noqa: TRY004
    return value


def tables_in(value: Any) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError("must be tables, each begun by its name in double brackets")
    return value


def switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")  # noqa: TRY004
    return value


def number(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) < float(2**53):  # also refuses nan
        raise ValueError("must be a number")
    return value  # type: ignore[no-any-return] # as was tested


def money(value: Any) -> int:
    """Read dollars as microdollars."""
    found = micro(number(value))
    if found is None:
        raise ValueError("must be dollars, as 0.04")
    return found


def whole(value: Any) -> int:
    if not isinstance(value, int) or number(value) < 1:
        raise ValueError("must be a whole number, 1 or more")
    return value


def positive(value: Any) -> float:
    if number(value) <= 0:
        raise ValueError("must be a number of seconds above 0")
    return float(value)


def one_of(words: Collection[str]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if text(value) not in words:
            raise ValueError(f"must be one of {', '.join(words)}{did_you_mean(text(value), words)}")
        return text(value)

    return read
