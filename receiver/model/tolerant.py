"""A tolerant JSON reader: good answers of providers contain NaN, BOMs and broken characters too.

Strict JSON is read as it is. Anything else is first rewritten as strict JSON, so that every value
can be stored and given to handlers:

    NaN, Infinity, 1e400, None        null, as any other word or number that is not JSON
    a byte that is not UTF-8          its character in Latin-1
    half a surrogate pair             U+FFFD
    a BOM, UTF-16, UTF-32             decoded
    control characters in a text      kept
    an escape that is not JSON        its characters
    a value nested too deep           null
    a comma after the last value      dropped
    marks and blanks around the JSON  dropped
"""

from __future__ import annotations

import codecs
import json
import math
import re
from typing import Any, Final

import msgspec

from receiver.model.errors import TooLarge, Unreadable

MOST_MARKS: Final = 1_000_000
"""Commas and brackets: each value after the first needs one, and takes far more memory."""
DEEPEST: Final = 100
_LONGEST_NUMBER: Final = 4300
_ASIDE: Final = "\ufeff\u200b\0\x1a\x1e;," + "".join(filter(str.isspace, map(chr, range(0x3001))))
"""Marks and blanks that are ignored before and after JSON."""
_MARKS: Final = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_RAW_BYTES: Final = re.compile("[\udc80-\udcff]")


def read_json(body: bytes | str) -> Any:
    """Return the value of JSON; raise Unreadable, or TooLarge if it would fill the memory."""
    comma, bracket, brace = (",", "[", "{") if isinstance(body, str) else (b",", b"[", b"{")
    opened = body.count(bracket) + body.count(brace)  # type: ignore[arg-type] # of one kind each
    if opened + body.count(comma) > MOST_MARKS:  # type: ignore[arg-type]
        raise TooLarge(f"more than {MOST_MARKS} values")
    try:
        value = _strict(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        value = _strict(_anew(body))
    if opened > DEEPEST and depth_of(value) > DEEPEST + 1:  # the innermost value is one level more
        return _strict(_repaired(_text(body)))
    return value


def text_of(body: bytes) -> str:
    """Decode text in the encoding that its first bytes show."""
    for mark, encoding in _MARKS:
        if body.startswith(mark):
            return body.decode(encoding, "replace")
    text = body.decode("utf-8", "surrogateescape")
    return _RAW_BYTES.sub(lambda found: chr(ord(found[0]) - 0xDC00), text)


def _strict(body: bytes | str) -> Any:
    return msgspec.json.decode(body)


def _text(body: bytes | str) -> str:
    return (text_of(body) if isinstance(body, bytes) else body).strip(_ASIDE)


def _anew(body: bytes | str) -> bytes:
    """Return the same content as strict JSON; raise Unreadable, which never quotes it."""
    text = _text(body)
    try:
        return _written(_LENIENT.decode(text))
    except (ValueError, RecursionError):
        return _repaired(text)


def _written(value: Any) -> bytes:
    anew = json.dumps(value, ensure_ascii=False)
    return anew.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


_TOKEN: Final = re.compile(
    r'"(?P<text>[^"\\]*(?:\\.[^"\\]*)*)(?:"|\Z)|(?P<word>[^\s"\[\]{},:]+)|'
    r"(?P<open>[\[{])|(?P<close>[\]}])|(?P<last>,)(?=\s*[\]}])|[,:]",
    re.DOTALL,
)
_ESCAPES: Final = re.compile(r'((?:\\(?:["\\/bfnrt]|u[\da-fA-F]{4}))+)|\\')
_NUMBER: Final = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII)


def _repaired(text: str) -> bytes:
    """Return strict JSON, with each invalid token replaced alone so that the rest is kept.

    Raise Unreadable for a body without any quoted text: it is prose, not broken JSON.
    """
    depth = 0

    def repair(token: re.Match[str]) -> str:
        nonlocal depth
        kind = token.lastgroup
        if kind == "close":
            depth -= 1
            return token[0] if depth < DEEPEST else ""
        depth += kind == "open"
        if depth > DEEPEST:
            return "null" if kind == "open" and depth == DEEPEST + 1 else ""
        if kind == "text":
            return _ESCAPES.sub(lambda found: found[1] or r"\\", token[0])
        if kind == "word" and not _NUMBER.fullmatch(token[0]):
            word = token[0].lower()
            return word if word in {"true", "false"} else "null"
        return "" if kind == "last" else token[0]

    if not text.startswith(("{", "[")) or '"' not in text:
        raise Unreadable("not JSON: DecodeError")
    repaired = _TOKEN.sub(repair, text)
    try:
        value, end = _LENIENT.raw_decode(repaired)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {type(error).__name__}") from error
    if '"' in repaired[end:]:
        raise Unreadable("not JSON: there is more after it")
    return _written(value)


def _int(digits: str) -> int | None:
    return int(digits) if len(digits) <= _LONGEST_NUMBER else None


def _float(digits: str) -> float | None:
    number = float(digits)
    return number if math.isfinite(number) else None


_LENIENT: Final = json.JSONDecoder(
    strict=False, parse_int=_int, parse_float=_float, parse_constant=lambda _: None
)


def depth_of(value: Any) -> int:
    """Return the nesting depth of a JSON value, without recursion."""
    deepest = 0
    left = [(value, 1)]
    while left:
        item, depth = left.pop()
        deepest = max(deepest, depth)
        if isinstance(item, dict):
            left.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, list):
            left.extend((inner, depth + 1) for inner in item)
    return deepest
