"""The parser of commands that people type in chats, and the text of `help`.

    imagine a lighthouse --ratio 16:9 steps=4 --seed=7 "at night"

The first word is the recipe. `--name value`, `--name=value` and `name=value` are options, the other
words are the text of the option that takes the rest. Quotes hold words together, a switch alone
means yes, `--no-switch` no, and after `--` all is text. Phones write typographic quotation marks,
and one long dash for two short ones: both are understood, the dash only before an option's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from receiver.model.costs import MICRO
from receiver.model.errors import Problem
from receiver.model.recipes import TRUTHS, Option, Recipe, RecipeBook
from receiver.model.text import did_you_mean, nearest
from receiver.model.values import plain
from receiver.predictions.recipes import bad_option, find, line

_ENDS: Final = {
    begins: re.compile(rf"(?<!\\)[{ends}](?!\S)")
    for begins, ends in {
        '"': '"”',
        "'": "'’",  # noqa: RUF001 - what phones write, here and below
        "“": '”"',
        "„": '“”"',
        "«": "»",
        "‘": "’'",  # noqa: RUF001
        "‚": "‘’",  # noqa: RUF001
    }.items()
}
"""The pattern of the end, by opening quotation mark: a closing one at the end of a word."""
_BEFORE: Final = re.compile(rf"[^\s={''.join(_ENDS)}]*=|")
_SOMETHING: Final = re.compile(r"\S+")
_LONGEST: Final = 10_000
"""Characters of a command; messages of platforms may have four times as many."""
_NEAR: Final = 0.8
"""Similarity (0 to 1) from which a word after a phone's dash is a mistyped option."""
_MOST_GUESSES: Final = 20
"""The most words after a phone's dash that are compared: a command may have thousands."""
_DASHED: Final = re.compile(
    r"(--|[—–―‒][-—–]?)([^\W\d_][\w-]*)(?:=(.*))?",  # noqa: RUF001 - what phones write
    re.DOTALL,
)
_NAMED: Final = re.compile(r"([^\W\d_][\w-]*)=(.*)", re.DOTALL)
_WORDS_OF_TRUTH: Final = TRUTHS.keys() - {"0", "1"}


class Command(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed command: an order of a recipe or, if `help` is not empty, only that text."""

    recipe: str = ""
    options: dict[str, Any] = {}
    help: str = ""


class Word(NamedTuple):
    """A word as it was typed, and without its quotation marks."""

    raw: str
    text: str

    @property
    def is_quoted(self) -> bool:
        return self.raw[:1] in _ENDS and self.raw != self.text


def parse(book: RecipeBook, text: str) -> Command:
    """Parse a command; raise Problem `unknown-recipe` or `bad-option` with a text for its author.

    The values of options are not checked here, but by the order.
    """
    if len(text) > _LONGEST:
        raise Problem(422, "bad-option", f"a command has at most {_LONGEST} characters")
    words = split(text)
    name = words.pop(0).text.lower().removeprefix("/") if words else ""
    if name in {"", "help"}:
        about = words[0].text.lower().removeprefix("/") if words else None
        return Command(help=help_text(book, about))
    recipe = find(book, name)
    if any(word.raw == "--help" for word in words):
        return Command(help=help_text(book, name))
    return Command(recipe=name, options=read_words(recipe, words))


def split(text: str) -> list[Word]:
    """Split a text into words; a quotation is one word.

    It begins at the beginning of a word or after its `=`, and ends at the end of a word; other
    quotation marks are apostrophes or inches.
    """
    return list(_split(text))


def _split(text: str) -> Iterator[Word]:
    unending: set[str] = set()
    at = 0
    while found := _SOMETHING.search(text, at):
        start = found.start()
        opens = _BEFORE.match(text, start).end()  # type: ignore[union-attr] # it may be empty
        end = _closed(text, opens, unending)
        if end is None:
            yield Word(found[0], found[0])
            at = found.end()
            continue
        at = end + 1
        inside = text[opens + 1 : end].replace('\\"', '"')
        yield Word(text[start:at], text[start:opens] + inside)


def _closed(text: str, opens: int, unending: set[str]) -> int | None:
    """Return where the quotation that begins at `opens` ends; None if there is none, or no end.

    A mark for which no end was found is not searched again: there is none further on either.
    """
    begins = text[opens : opens + 1]
    if begins not in _ENDS or begins in unending:
        return None
    found = _ENDS[begins].search(text, opens + 1)
    if found is None:
        unending.add(begins)
        return None
    return found.start()


def read_words(recipe: Recipe, words: Sequence[Word]) -> dict[str, Any]:
    """Return the options in the words after a recipe's name; raise Problem if they are wrong."""
    reading = _Reading(recipe)
    left = list(words)
    while left:
        word = left.pop(0)
        if word.raw == "--":
            reading.texts += left
            break
        reading.take(word, left)
    return reading.options()


class _Reading:
    """The options read so far, and the words that belong to no option yet."""

    def __init__(self, recipe: Recipe) -> None:
        self.texts: list[Word] = []
        self._recipe = recipe
        self._names = {name.lower(): name for name in recipe.options}
        self._found: dict[str, Any] = {}
        self._guesses = _MOST_GUESSES

    def take(self, word: Word, left: list[Word]) -> None:
        """Read a word and, if its option takes one, its value from `left`."""
        dashed = None if word.is_quoted else _DASHED.fullmatch(word.text)
        if dashed and self._is_meant(dashed[1], dashed[2].lower()):
            self._switch(dashed[2].lower(), dashed[3], left)
            return
        named = None if word.is_quoted else _NAMED.fullmatch(word.text)
        if named and named[1].lower() in self._names:
            self._set(self._names[named[1].lower()], named[2])
            return
        self.texts.append(word)

    def _is_meant(self, dashes: str, name: str) -> bool:
        """Return whether dashes make a word an option: two short ones do, a phone's one may not."""
        known = [*self._names, *(f"no-{each}" for each in self._names)]
        if dashes == "--" or name in known:
            return True
        self._guesses -= 1
        return self._guesses >= 0 and nearest(name[:40], known, _NEAR) is not None

    def _switch(self, word: str, value: str | None, left: list[Word]) -> None:
        off = self._names.get(word.removeprefix("no-"))
        if word not in self._names and off and self._recipe.options[off].kind == "boolean":
            self._set(off, False)
            return
        if word not in self._names:
            raise self._bad(
                f"there is no option --{word[:40]}{did_you_mean(word[:40], self._names)}"
            )
        name = self._names[word]
        if value is None:
            value = self._value(name, self._recipe.options[name], left)
        self._set(name, value)

    def _value(self, name: str, option: Option, left: list[Word]) -> str:
        if option.kind == "boolean":
            given = left and left[0].text.lower() in _WORDS_OF_TRUTH
            return left.pop(0).text if given else "yes"
        if not left:
            raise self._bad(f"--{name} needs a value")
        return left.pop(0).text

    def _set(self, name: str, value: Any) -> None:
        if name in self._found:
            raise self._bad(f"{name} is given twice")
        self._found[name] = value

    def options(self) -> dict[str, Any]:
        """Return all options, the remaining words among them."""
        rest = self._recipe.rest
        if rest is not None and self.texts:
            self._set(rest, _joined(self.texts))
        elif self.texts:
            self._fill_in()
        return self._found

    def _fill_in(self) -> None:
        """Set the required options that have no value to the words, in their order."""
        open_ = [
            name
            for name, option in self._recipe.options.items()
            if option.required and name not in self._found
        ]
        for word in self.texts:
            if not open_:
                raise self._bad(f"{word.text[:40]!r} belongs to no option")
            self._set(open_.pop(0), word.text)

    def _bad(self, wrong: str) -> Problem:
        return bad_option(self._recipe, [wrong], {**_examples(self._recipe), **self._found})


def _joined(words: Sequence[Word]) -> str:
    """Join words to a text; quotation marks are kept, unless they enclose the whole text."""
    return words[0].text if len(words) == 1 else " ".join(word.raw for word in words)


# --- help ---


def help_text(book: RecipeBook, name: str | None) -> str:
    """Return the help on all recipes, or on one by name; raise Problem if there is none."""
    if name is not None:
        return _help_of(find(book, name))
    if not book.recipes:
        return "There is nothing to order here."
    listed = [f"{each.name}  {each.about}".rstrip() for each in book.recipes.values()]
    return "\n".join([*listed, f"help {next(iter(book.recipes))}  shows how to order it"])


def _help_of(recipe: Recipe) -> str:
    lines = [recipe.about] if recipe.about else []
    lines.append(line(recipe, _examples(recipe)))
    lines += [f"  {name}  {_about(option)}".rstrip() for name, option in recipe.options.items()]
    if recipe.price is not None:
        lines.append(f"It costs ${recipe.price / MICRO:g}.")
    return "\n".join(lines)


def _examples(recipe: Recipe) -> dict[str, Any]:
    """Return example values of the options that are required or have choices."""
    return {
        name: f"<{name}>" if not option.choices else (option.default or option.choices[0])
        for name, option in recipe.options.items()
        if option.required or option.choices
    }


def _about(option: Option) -> str:
    bounds = {"at least": option.least, "at most": option.most}
    parts = [
        option.about,
        " | ".join(map(plain, option.choices)) or _KINDS.get(option.kind, ""),
        *(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None),
        f"at most {option.longest} characters" if option.longest else "",
        "required" if option.required else _default(option),
    ]
    return ", ".join(part for part in parts if part)


_KINDS: Final = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "yes or no",
    "picture": "a picture's address",
}


def _default(option: Option) -> str:
    return "" if option.default is None else f"{plain(option.default)} if not given"


def words_of(arguments: Iterable[str]) -> list[Word]:
    """Return arguments, which a shell has already split, as words."""
    return [Word(text, text) for text in arguments]
