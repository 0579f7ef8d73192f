"""structlog set-up, redaction, and the list of event names.

One line says one thing: a dotted event name and the ids as fields. Callback bodies, signatures,
inputs and keys are never fields; `redact` is the net below that rule.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import io
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from functools import lru_cache
from typing import Any, Final, TextIO

import msgspec
import structlog

from receiver.model.text import spelled, spelled_json

EVENTS: Final = frozenset(
    {
        "receiver.started",
        "receiver.stopping",
        "receiver.stopped",
        "settings.warning",
        "request.failed",
        "request.limited",
        "request.handled",
        "outcome.taken",
        "event.unrouted",
        "submit.accepted",
        "submit.postponed",
        "submit.rejected",
        "submit.unconfirmed",
        "poll.failed",
        "cancel.failed",
        "prediction.expired",
        "prediction.erased",
        "predictions.deleted",
        "published.fetched",
        "published.failed",
        "stream.connected",
        "stream.lost",
        "stream.unknown",
        "store.unavailable",
        "store.recovered",
        "handler.registered",
        "handler.missing",
        "handler.attempt",
        "handler.stuck",
        "handler.interrupted",
        "handler.held",
        "handler.released",
        "handler.paused",
        "handler.resumed",
        "handler.waiting",
        "reader.cut",
        "replay.started",
        "replay.ended",
        "clock.skewed",
        "lease.unrenewed",
        "news.interrupted",
        "sweep.failed",
        "sweep.interrupted",
        "step.unkept",
        "loop.blocked",
        "task.failed",
    }
)
"""Every event name of ours; a test holds the code against it."""

SECRET_WORDS: Final = ("secret", "token", "authorization", "api_key", "signature", "password")


def redact(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Hide the value of every field whose name sounds like a secret."""
    for name in event:
        if _sounds_secret(name):
            event[name] = "**********"
    return event


@lru_cache(maxsize=1024)
def _sounds_secret(name: str) -> bool:
    return any(word in name.lower() for word in SECRET_WORDS)


def configure(fmt: str | None, level: str, stream: TextIO | None = None) -> None:
    """Send structlog and the standard library's loggers to one stream, in one form."""
    out = stream or sys.stderr
    console = fmt == "console" or (fmt is None and out.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        redact,
        _stamp,
    ]
    last: list[Any] = (
        [
            _spell,
            structlog.dev.ConsoleRenderer(
                colors=out.isatty(),
                # The richer ones show local variables, and so whatever secret is in them.
                exception_formatter=_tell_traceback,
            ),
        ]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(_dumps)]
    )
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_factory(out),
        cache_logger_on_first_use=True,
    )
    _adopt_standard_library(shared, last, level, out)


def _adopt_standard_library(shared: list[Any], last: list[Any], level: str, out: TextIO) -> None:
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in ("httpx", "httpcore"):
        # They log whole URLs at info, and a submit's URL carries the callback token.
        logging.getLogger(name).setLevel(logging.WARNING)


def _spell(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Spell out what others have put into their words to act on a terminal."""
    for name, value in event.items():
        if isinstance(value, str):
            event[name] = spelled(value)
    return event


def _tell_traceback(out: TextIO, error: structlog.typing.ExcInfo) -> None:
    """Write a traceback, set in, so that no line of an error's message passes for one of ours."""
    plain = io.StringIO()
    structlog.dev.plain_traceback(plain, error)
    out.write("\n".join(f"    {spelled(line)}" for line in plain.getvalue().split("\n")))


def _stamp(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Say when, in UTC, to the microsecond."""
    seconds, micros = divmod(time.time_ns() // 1000, 1_000_000)
    event["time"] = f"{_to_the_second(seconds)}.{micros:06d}Z"
    return event


@lru_cache(maxsize=2)
def _to_the_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


class _Lines:
    """Writes lines to a stream; those of one turn of the event loop together.

    A write gives up the interpreter lock, and getting it back from the writing thread costs more
    than the line: one write for each line would be the dearest part of taking a callback.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._waiting: list[str] = []
        atexit.register(self.flush)

    def msg(self, line: str) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._write(line + "\n")
            return
        if not self._waiting:
            loop.call_soon(self.flush)
        self._waiting.append(line)

    debug = info = warning = error = critical = exception = msg

    def flush(self) -> None:
        lines, self._waiting = self._waiting, []
        if lines:
            self._write("\n".join([*lines, ""]))

    def _write(self, text: str) -> None:
        # Closed, full or read by nobody: there is nowhere to say it, and work must go on.
        with contextlib.suppress(ValueError, OSError):
            self._out.write(text)
            self._out.flush()


def _factory(out: TextIO) -> Callable[..., _Lines]:
    lines = _Lines(out)
    return lambda *_: lines


def _dumps(event: Mapping[str, Any], **_: Any) -> str:
    try:
        return spelled_json(msgspec.json.encode(event, enc_hook=repr).decode())
    except UnicodeEncodeError:  # half a character, from a name or a message that is no UTF-8
        return json.dumps(event, default=repr)
