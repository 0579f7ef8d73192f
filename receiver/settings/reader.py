"""The reader of settings: it takes values from an environment, and collects all problems."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

from receiver.model.errors import SettingsError
from receiver.model.text import clean, did_you_mean

T = TypeVar("T")
D = TypeVar("D")
_OF_HANDLERS: Final[set[str]] = set()
"""The names of settings that handlers have asked for."""


class Secret:
    """A text that only `reveal` shows."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "Secret('**********')"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


def checked(found: T, problems: Sequence[str]) -> T:
    """Return what was read; if there are problems, raise one SettingsError that names all."""
    if problems:
        raise SettingsError(problems)
    return found


def misspelled_of_handlers(env: Mapping[str, str]) -> list[str]:
    """Return a problem for each variable whose name is close to an unset setting of a handler.

    The receiver's own settings, which handlers may read too, are checked elsewhere.
    """
    unset = sorted(_OF_HANDLERS - env.keys())
    firsts = tuple({f"{name.partition('_')[0]}_" for name in unset})
    near = {
        name: did_you_mean(name, unset, cutoff=0.8)
        for name in sorted(env.keys() - _OF_HANDLERS)
        if name.startswith(firsts)
    }
    return [f"{name} is not a setting{it}" for name, it in near.items() if it]


class Reader:
    """Takes values from a mapping, and collects their problems."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self.problems: list[str] = []

    def get(
        self,
        name: str,
        parse: Callable[[str], T],
        default: D,
        *,
        as_text: str | None = "",
        says: str = "",
        at: str = "",
    ) -> T | D:
        """Return a value as parsed; `default` if it is not set or wrong.

        `as_text`: a default that is parsed too; None: a value is required. `says` (what it is) and
        `at` (where it is read) are for problems of handlers' settings.
        """
        if at and not name.startswith("RECEIVER_"):
            _OF_HANDLERS.add(name)
        given = self._env.get(name, "").strip()
        text = clean(given) or as_text
        if text is None:
            self._refuse(f"{at}needs {name} as {says}")
            return default
        if not text and not at:
            return default
        try:
            text.encode()
            return _parsed(parse, text, given)
        except UnicodeEncodeError:
            problem = "must be UTF-8"
        except ValueError as error:
            problem = str(error)
        self._refuse(f"{at}{name}{' ' if at else ': '}{problem}")
        return default

    def is_set(self, name: str) -> bool:
        return bool(clean(self._env.get(name, "")))

    def spelled(self, name: str) -> str:
        """Return the name in lower case if that is set: it has precedence."""
        return name.lower() if name.lower() in self._env else name

    def _refuse(self, problem: str) -> None:
        if problem not in self.problems:  # a name may be read twice
            self.problems.append(problem)


def _parsed(parse: Callable[[str], T], text: str, given: str) -> T:
    """Parse a text; with the quotes around it if it is valid only with them."""
    try:
        return parse(text)
    except ValueError:
        if given not in {text, ""}:
            with contextlib.suppress(ValueError):
                return parse(given)
        raise
