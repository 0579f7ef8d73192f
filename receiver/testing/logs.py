"""Log lines in tests: warnings and errors only, with the line of the handler."""

from __future__ import annotations

import os
import sysconfig
import traceback
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import structlog

import receiver

_ELSEWHERE: Final = tuple(
    f"{folder}{os.sep}"
    for folder in (
        Path(receiver.__file__).parent,
        *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")),
    )
)
"""Folders of code that is not the test author's own."""
_IDS: Final = {"delivery", "event_id", "prediction", "request"}
"""Fields that differ in each run."""
_PRINTED: Final = {"handler", "attempt", "result", "state", "reason"}
"""Fields of an attempt that are printed: a test knows the others itself."""


@contextmanager
def warnings_only() -> Iterator[None]:
    """Print only warnings and errors, as plain text; no change if structlog is configured."""
    if structlog.is_configured():
        yield
        return
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            _drop_info,
            structlog.processors.ExceptionRenderer(lambda info: "".join(_trace(info[1])).rstrip()),
            _Short(),
        ]
    )
    try:
        yield
    finally:
        structlog.reset_defaults()


def _drop_info(_: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if method in {"debug", "info"}:
        raise structlog.DropEvent
    return event


class _Short:
    """A renderer of events as one line; a traceback is added only when it first occurs."""

    def __init__(self) -> None:
        self._attempts: set[str] = set()
        self._errors: set[str] = set()

    def __call__(self, _: Any, method: str, event: MutableMapping[str, Any]) -> str:
        """Return the text; drop an attempt that ended like an earlier one."""
        trace, name = event.pop("exception", ""), event.pop("event")
        wanted = _PRINTED if name == "handler.attempt" else event.keys() - _IDS
        fields = {key: value for key, value in event.items() if key in wanted}
        if name == "handler.attempt" and not _is_new(repr(fields | {"attempt": 0}), self._attempts):
            raise structlog.DropEvent
        line = " ".join([f"{method}: {name}", *(f"{key}={value}" for key, value in fields.items())])
        return f"{line}\n{trace}" if trace and _is_new(trace, self._errors) else line


def _is_new(text: str, known: set[str]) -> bool:
    if text in known:
        return False
    known.add(text)
    return True


def _trace(error: BaseException) -> list[str]:
    """Return the frames in the author's own code, and the error."""
    found = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in found if not frame.filename.startswith(_ELSEWHERE)] or found[-1:]
    frames = traceback.format_list([*own[:1], *own[1:][-2:]])
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    below = [line for part in parts for line in _trace(part)]
    return [*frames, *traceback.format_exception_only(type(error), error), *below]
