"""Untrusted texts: trimmed where they are read, escaped where a terminal shows them."""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections.abc import Iterable
from typing import Final

_QUOTES: Final = ("'", '"')


def clean(text: str) -> str:
    """Return a setting without surrounding blanks, line ends and quotation marks.

    A file that contains a setting ends in LF or CR LF, and Docker's --env-file keeps the quotes.
    """
    text = text.strip()
    is_quoted = text[:1] in _QUOTES and text[0] == text[-1] and text[0] not in text[1:-1]
    return text[1:-1].strip() if is_quoted and len(text) > 1 else text


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the valid word that is most similar to a word; None if none is similar enough."""
    return next(iter(difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)), None)


def did_you_mean(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the end of an error about a word: the most similar valid word, if there is one."""
    near = nearest(word, words, cutoff)
    return "" if near is None else f" (did you mean {near}?)"


def spelled(text: str) -> str:
    r"""Return a text with invisible characters escaped, as \x1b or \u202e.

    Escape sequences, line ends, direction marks and zero-width characters would otherwise let the
    sender write anything on the reader's terminal.
    """
    if text.isprintable():
        return text
    return "".join(char if _shows(char) else ascii(char)[1:-1] for char in text)


def spelled_json(text: str) -> str:
    """Return the same JSON with invisible characters escaped, except line ends between values."""
    if text.isprintable():
        return text
    return "".join(
        char if _shows(char) or char == "\n" else json.dumps(char)[1:-1] for char in text
    )


def _shows(char: str) -> bool:
    # Blanks of other widths (the ideographic one) are harmless, and common in prompts.
    return char.isprintable() or unicodedata.category(char) == "Zs"
