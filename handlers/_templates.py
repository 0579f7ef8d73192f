"""Templates and conditions over a call: its values, by their paths in body and headers."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import msgspec

from receiver import Problem

HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+", re.ASCII)
PARTS = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
BRACES = {"{{": "{", "}}": "}"}
LONGEST_NAME = 200
LARGEST = 2**53
LEFT_OUT: Any = object()
"""Stands for a missing value."""


@dataclass(frozen=True)
class Message:
    """A proved call, unwrapped."""

    headers: Mapping[str, str]
    body: Any


def word(value: Any) -> str:
    """Return a JSON value as text for a pattern or a template: true, not True."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def unfit(detail: str) -> Problem:
    return Problem(400, "invalid-body", detail)


@dataclass(frozen=True)
class CallPath:
    """The path of a value: `issue.title` or `items.0.id` in the body, `header:ce-id` of a header.

    Raises ValueError for a malformed path.
    """

    text: str

    def __post_init__(self) -> None:
        name = self.text.removeprefix("header:")
        if name == self.text:
            fits = all(self.text.split("."))
        else:
            fits = HEADER.fullmatch(name.lower()) is not None
        if not fits:
            raise ValueError(f"has {self.text!r}: a path is like issue.title or header:ce-id")

    def find(self, message: Message) -> Any:
        if self.text.startswith("header:"):
            name = self.text.removeprefix("header:").lower()
            return message.headers.get(name, LEFT_OUT)
        value = message.body
        for step in self.text.split("."):
            if isinstance(value, dict):
                value = value.get(step, LEFT_OUT)
            elif isinstance(value, list) and re.fullmatch(r"[0-9]{1,6}", step, re.ASCII):
                value = value[int(step)] if int(step) < len(value) else LEFT_OUT
            else:
                return LEFT_OUT
        return value


@dataclass(frozen=True)
class Template:
    """A text with paths in braces; a template of one path only keeps its value's JSON type."""

    parts: tuple[str | CallPath, ...]

    @property
    def fixed(self) -> str | None:
        """The text if it is the same for every call, else None."""
        texts = [part for part in self.parts if isinstance(part, str)]
        return "".join(texts) if len(texts) == len(self.parts) else None

    def fill(self, message: Message) -> Any:
        """Return the value for a call, LEFT_OUT if it has none; raise Problem if it is unfit."""
        if len(self.parts) == 1 and isinstance(self.parts[0], CallPath):
            value = scalar(self.parts[0], message)
            return LEFT_OUT if value is None else value
        return "".join(self._texts(message))

    def name(self, what: str, message: Message, longest: int = LONGEST_NAME) -> str:
        """Return a name or key; raise Problem if the call leaves a part of it empty."""
        texts = self._texts(message)
        joined = "".join(texts)
        if not all(texts) or len(joined) > longest or not joined.isprintable():
            raise unfit(f"there is no {what}, or it has not 1 to {longest} characters that print")
        return joined

    def _texts(self, message: Message) -> list[str]:
        return [part if isinstance(part, str) else text(part, message) for part in self.parts]


def is_scalar(value: Any) -> bool:
    return value is not LEFT_OUT and not isinstance(value, dict | list)


def scalar(path: CallPath, message: Message) -> Any:
    value = path.find(message)
    if isinstance(value, dict | list):
        raise unfit(f"{path.text} must be a text, a number, true or false")
    return value


def text(path: CallPath, message: Message) -> str:
    value = scalar(path, message)
    if value is LEFT_OUT:
        raise unfit(f"{path.text} is missing")
    return "" if value is None else word(value)


Values: TypeAlias = Mapping[str, Template | int | float]


def filled(values: Values, message: Message) -> dict[str, Any]:
    """Return the values for a call, without those that the call does not have."""
    found = {
        name: value.fill(message) if isinstance(value, Template) else value
        for name, value in values.items()
    }
    return {name: value for name, value in found.items() if value is not LEFT_OUT}


@dataclass(frozen=True)
class Condition:
    """A condition: the value at a path, or an item of a list there, must match a pattern."""

    path: CallPath
    patterns: tuple[str, ...]

    def holds(self, message: Message) -> bool:
        found = self.path.find(message)
        values = found if isinstance(found, list) else [found]
        words = [word(value) for value in values if is_scalar(value)]
        return any(fnmatchcase(each, pattern) for each in words for pattern in self.patterns)


# --- reading them from a file ---


def name_of(value: Any) -> Template:
    """Return the template of a name; raise ValueError if it is empty."""
    found = template(value)
    if not found.parts:
        raise ValueError("must not be empty")
    return found


def key_of(value: Any) -> Template:
    found = template(value)
    if found.fixed is not None:
        raise ValueError('must differ from order to order, as "{id}"')
    return found


def value_of(value: Any) -> Template | int | float:
    if isinstance(value, int | float) and abs(value) <= LARGEST:  # false for nan
        return value
    return template(value)


def template(value: Any) -> Template:
    if not isinstance(value, str):
        raise ValueError("must be a text in quotes")  # noqa: TRY004 - about a file's content
    return Template(tuple(parts_of(value)))


def parts_of(value: str) -> Iterator[str | CallPath]:
    end = 0
    for found in PARTS.finditer(value):
        if found.start() > end:
            yield value[end : found.start()]
        end = found.end()
        if found[0] in {"{", "}"}:
            raise ValueError(f"has {value!r}: a brace itself is written {{{{ or }}}}")
        yield BRACES[found[0]] if found[1] is None else CallPath(found[1])
    if end < len(value):
        yield value[end:]


def conditions(value: Any) -> tuple[Condition, ...]:
    if not isinstance(value, dict):
        raise ValueError('must be a table, as { action = "opened" }')  # noqa: TRY004
    return tuple(conditions_in(value, ""))


def conditions_in(value: Mapping[str, Any], before: str) -> Iterator[Condition]:
    for name, wanted in value.items():
        if isinstance(wanted, dict):  # TOML reads a.b = 1 as a table in a table
            yield from conditions_in(wanted, f"{before}{name}.")
            continue
        patterns = wanted if isinstance(wanted, list) else [wanted]
        if not patterns or not all(isinstance(one, str | int | float) for one in patterns):
            raise ValueError(f"{before}{name} must be a pattern, or a list of them")
        yield Condition(CallPath(before + name), tuple(map(word, patterns)))
