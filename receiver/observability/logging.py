"""Logging: the set-up of structlog, and redaction.

One line reports one event: a dotted event name and the ids as fields. Callback bodies, signatures,
inputs and keys are never fields; `redact` is a safety net for that rule.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import select
import sys
import threading
import time
from collections.abc import MutableMapping
from functools import lru_cache
from queue import Empty, SimpleQueue
from typing import Any, Final, TextIO

import msgspec
import structlog

from receiver.model.tasks import start_thread
from receiver.model.text import spelled_json
from receiver.observability.console import Console

_MAX_QUEUED: Final = 4 * 1024 * 1024
"""The most characters of lines that wait to be written."""
_BATCH_SECONDS: Final = 0.005
"""Seconds for which lines are gathered before they are written together."""
LAST_LINES: Final = 1.0
"""Seconds to write the last lines of a process."""

_WRITERS: Final[list[_LineWriter]] = []
"""The current writer of lines."""

SECRET_WORDS: Final = ("secret", "token", "authorization", "api_key", "signature", "password")


def redact(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Hide the value of every field whose name sounds like a secret."""
    for name in event:
        if _sounds_secret(name):
            event[name] = "**********"
    return event


def _complete(_: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add level and time, and hide secrets: in one step, as each step costs as much as its work."""
    structlog.stdlib.add_log_level(_, method, event)
    redact(_, method, event)
    return _stamp(_, method, event)


@lru_cache(maxsize=1024)
def _sounds_secret(name: str) -> bool:
    return any(word in name.lower() for word in SECRET_WORDS)


def configure_unless_done(fmt: str | None, level: str) -> None:
    """Configure structlog and the standard library's root logger, unless that is done.

    For an app that runs in another server or is embedded in another program.
    """
    _silence_http_clients()
    if not structlog.is_configured():
        lines, shared, last = _set_up(fmt, level, sys.stderr, is_final=False)
        if not logging.getLogger().handlers:
            _adopt_standard_library(shared, last, level, lines)


def configure(fmt: str | None, level: str, stream: TextIO | None = None) -> None:
    """Send structlog and the standard library's loggers to one stream, in one format."""
    lines, shared, last = _set_up(fmt, level, stream or sys.stderr, is_final=True)
    _adopt_standard_library(shared, last, level, lines)


def _set_up(
    fmt: str | None, level: str, out: TextIO, *, is_final: bool
) -> tuple[_LineWriter, list[Any], list[Any]]:
    """Configure structlog; return the writer, and the processors: the shared and the last."""
    flush()
    _WRITERS[:] = [lines := _LineWriter(out)]
    console = fmt == "console" or (fmt is None and out.isatty())
    shared: list[Any] = [structlog.contextvars.merge_contextvars, _complete]
    last: list[Any] = (
        [structlog.processors.format_exc_info, Console(out)]
        if console
        else [structlog.processors.format_exc_info, _render]
    )
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: lines,
        # A logger that was used keeps the configuration of that time.
        cache_logger_on_first_use=is_final,
    )
    return lines, shared, last


def _adopt_standard_library(
    shared: list[Any], last: list[Any], level: str, lines: _LineWriter
) -> None:
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )
    handler = _Handler(lines)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    _silence_http_clients()
    # Python's own output to standard error must not block either.
    logging.captureWarnings(True)
    sys.unraisablehook = _on_unraisable
    threading.excepthook = _on_thread_end


def _silence_http_clients() -> None:
    """Keep HTTP clients from logging URLs at info: a submit's URL carries the callback token."""
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _on_unraisable(args: sys.UnraisableHookArgs) -> None:
    log = structlog.get_logger("receiver")
    log.error("task.failed", where=args.err_msg or repr(args.object), exc_info=args.exc_value)


def _on_thread_end(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit:
        name = args.thread.name if args.thread else None
        log = structlog.get_logger("receiver")
        log.error("task.failed", thread=name, exc_info=args.exc_value)


def _stamp(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add the time in UTC, to the microsecond."""
    seconds, micros = divmod(time.time_ns() // 1000, 1_000_000)
    event["time"] = f"{_to_the_second(seconds)}.{micros:06d}Z"
    return event


@lru_cache(maxsize=2)
def _to_the_second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


class _LineWriter:
    """Writes lines to a stream from a thread of its own, so that a stalled reader blocks nothing.

    The queue is bounded; lines beyond that are dropped and counted, and the count is logged as soon
    as a write succeeds again. The lines of a moment are written together: a write releases the
    interpreter lock, and one for each line would be the most expensive part of a callback.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        try:
            self._fd: int | None = out.fileno()
        except (OSError, ValueError, AttributeError):
            self._fd = None
        self._is_cut = False
        """Whether the last line was written only in part."""
        self._begin()
        os.register_at_fork(after_in_child=self._begin)
        atexit.register(self.flush)

    def _begin(self) -> None:
        """Begin with an empty queue and no thread, also in a process that was just forked."""
        # Both are reentrant, unlike a plain lock: a signal's handler may log.
        self._lock = threading.RLock()
        self._queue: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._size = 0
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def msg(self, line: str) -> None:
        with self._lock:
            # After a drop, lines are dropped until the queue is empty.
            if self._size > (0 if self._dropped else _MAX_QUEUED):
                self._dropped += 1
                return
            self._size += len(line)
            self._queue.put(line)
            if self._thread is None:
                self._thread = start_thread("receiver-log", self._run)

    debug = info = warning = error = critical = exception = msg

    def flush(self, seconds: float = LAST_LINES) -> bool:
        """Wait, `seconds` at most, until all lines are written; return whether they are."""
        if self._thread is None or not self._thread.is_alive():
            return True
        written = threading.Event()
        self._queue.put(written)
        return written.wait(seconds)

    def _run(self) -> None:
        while True:
            found = [self._queue.get()]
            if isinstance(found[0], str):
                time.sleep(_BATCH_SECONDS)
            with contextlib.suppress(Empty):
                while True:
                    found.append(self._queue.get_nowait())
            lines = [one for one in found if isinstance(one, str)]
            is_written = bool(lines) and self._write("\n".join([*lines, ""]))
            with self._lock:
                self._size -= sum(map(len, lines))
                dropped = 0
                if is_written:
                    dropped, self._dropped = self._dropped, 0
                else:
                    self._dropped += len(lines)
            if dropped:
                log = structlog.get_logger("receiver")
                log.error("log.dropped", lines=dropped)
            for one in found:
                if not isinstance(one, str):
                    one.set()

    def _write(self, text: str) -> bool:
        """Write, however long it takes; return False if the stream is closed or full."""
        try:
            if self._fd is None:
                self._out.write(text)
                self._out.flush()
            else:
                # Not by the stream: other threads, and Python's exit, would wait for its lock.
                self._write_bytes(self._fd, text.encode(errors="backslashreplace"))
        except (ValueError, OSError):
            return False
        return True

    def _write_bytes(self, fd: int, content: bytes) -> None:
        left = memoryview(b"\n" + content if self._is_cut else content)
        while left:
            try:
                written = os.write(fd, left)
            except BlockingIOError:
                select.select([], [fd], [])
                continue
            left = left[written:]
            self._is_cut = bool(left)


class _Handler(logging.Handler):
    """Writes the records of the standard library's loggers by `_LineWriter`."""

    def __init__(self, lines: _LineWriter) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.msg(self.format(record))
        except Exception:
            log = structlog.get_logger("receiver")  # as it is configured now
            log.exception("task.failed", logger=record.name)


def flush(seconds: float = LAST_LINES) -> bool:
    """Wait, `seconds` at most, until all lines are written; return whether they are."""
    return all(lines.flush(seconds) for lines in _WRITERS)


def _render(_: Any, __: str, event: MutableMapping[str, Any]) -> str:
    try:
        return spelled_json(msgspec.json.encode(event, enc_hook=repr).decode())
    except Exception:  # noqa: BLE001 - the call that logs must not fail
        return _render_any(event)


def _render_any(event: MutableMapping[str, Any]) -> str:
    """Render what `msgspec` cannot: half characters of names that are not UTF-8, or worse."""
    try:
        return json.dumps(event, default=repr)
    except Exception:  # noqa: BLE001 - a `repr` of a handler's own raises, or a list holds itself
        return json.dumps({name: _plain(value) for name, value in event.items()})


def _plain(value: object) -> str | float | None:
    """Return a simple value, or the name of the type of another."""
    return value if isinstance(value, str | int | float | None) else type(value).__name__
