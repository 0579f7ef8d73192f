"""Templates: texts with fields of an event in braces, for the settings of handlers."""

from __future__ import annotations

import contextlib
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from receiver.model.values import Event, Output


def cut(text: str, longest: int, *, partial: str = "", utf16: bool = False) -> str:
    """Shorten a text to `longest` characters, with … as the last one.

    `partial` is a regular expression of text to remove at the end, such as half of an escape.
    `utf16`: count UTF-16 units, as some services do, instead of characters.
    """
    raw = text.encode("utf-16-le", "surrogatepass") if utf16 else b""
    if max(len(text), len(raw) // 2) <= longest:
        return text
    short = raw[: 2 * longest - 2].decode("utf-16-le", "ignore") if utf16 else text[: longest - 1]
    return (re.sub(f"(?:{partial})$", "", short) if partial else short) + "…"


def _urls(event: Event) -> list[str]:
    found = (_address(output) for output in event.prediction.output or [])
    return [url for url in found if url]


def _address(output: Output) -> str | None:
    """Return the address where a browser finds a result; a data URI does not count."""
    return output.address or (output.stored.url if output.stored else None)


def _seconds(event: Event) -> float | None:
    begun = event.prediction.submitted_at
    return None if begun is None else round((event.time - begun).total_seconds(), 1)


_FIELDS: Final[dict[str, Callable[[Event], Any]]] = {
    "id": lambda event: event.prediction.id,
    "event": lambda event: event.id,
    "type": lambda event: event.type.removeprefix("prediction."),
    "provider": lambda event: event.prediction.provider,
    "model": lambda event: event.prediction.model,
    "prompt": lambda event: event.prediction.input.get("prompt"),
    "input": lambda event: event.prediction.input,
    "metadata": lambda event: event.prediction.metadata,
    "code": lambda event: event.prediction.error and event.prediction.error.code,
    "error": lambda event: event.prediction.error and event.prediction.error.message,
    "url": lambda event: next(iter(_urls(event)), None),
    "urls": lambda event: "\n".join(_urls(event)),
    "text": lambda event: "\n".join(o.text for o in event.prediction.output or [] if o.text),
    "date": lambda event: event.time,
    "seconds": _seconds,
}
_CONVERSIONS: Final = frozenset({None, "r", "s", "a"})
_LONGEST_NUMBER: Final = 5
"""Digits of a number in a format: a width of millions is a mistake and takes all memory."""
_SAMPLES: Final = ("text", 1, 1.5)
_INSIDE: Final = frozenset({"input", "metadata"})
_NAME: Final = re.compile(r"(\w+)(?:\[([^\[\]{}]+)\])?")


class Template:
    """A text like `{model}: {prompt:.80} {metadata[order]} {date:%Y-%m-%d}`.

    Fields: id, event, type, provider, model, prompt, input[…], metadata[…], code, error, url, urls,
    text, date (UTC), seconds (from submit to end), and those that `more` names. A field without a
    value is empty. `url` is the address where the first result is kept if a browser can open it,
    else the provider's URL. A format is Python's, without fields inside it.
    Raises ValueError for an unknown field, or for a format that does not suit it.
    """

    def __init__(self, text: str, more: Sequence[str] = ()) -> None:
        self._text = text
        known = {*_FIELDS, *more}
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"{text!r} is not a template: {error}") from error
        for _, field, form, conversion in parts:
            if field is None:
                continue
            found = _NAME.fullmatch(field)
            if not found or found[1] not in known or not _fits(found):
                raise ValueError(
                    f"{{{field}}} in {text!r} is not a field: use {', '.join(sorted(known))}"
                )
            if conversion not in _CONVERSIONS:
                raise ValueError(f"!{conversion} in {text!r} is not a conversion: use !r, !s or !a")
            if "{" in (form or ""):
                raise ValueError(f"{form!r} in {text!r}: a format has no fields of its own")
            if form and not _formats(form):
                raise ValueError(f"{form!r} in {text!r} is not a format for {field}")

    def fill(
        self, event: Event, clean: Callable[[str], str] = str, more: Mapping[str, Any] | None = None
    ) -> str:
        """Return the text with its fields filled in; `clean` is applied to each field's value."""
        return _Filling(event, clean, more or {}).format(self._text)


def _fits(found: re.Match[str]) -> bool:
    return (found[1] in _INSIDE) == (found[2] is not None)


def _formats(form: str) -> bool:
    """Return whether a format suits a text, a number or a date, at a sensible width."""
    if any(len(number) > _LONGEST_NUMBER for number in re.findall(r"\d+", form)):
        return False
    for sample in () if "%" in form else _SAMPLES:  # a date accepts any format with a %
        with contextlib.suppress(ValueError):
            format(sample, form)
            return True
    return "%" in form


class _Filling(string.Formatter):
    def __init__(self, event: Event, clean: Callable[[str], str], more: Mapping[str, Any]) -> None:
        self._event = event
        self._clean = clean
        self._more = more

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:  # noqa: ARG002
        found = _NAME.fullmatch(field_name)
        name, key = found.groups() if found else (field_name, None)
        value = self._more[name] if name in self._more else _FIELDS[name](self._event)
        return (value if key is None else value.get(key)), name

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, dict | list | bool):
            value = json.dumps(value, ensure_ascii=False)
        try:
            text = format("" if value is None else value, format_spec)
        except ValueError:  # the format is for numbers, and this event's value is a text
            text = str(value)
        return self._clean(text)
