"""Logs: one format for all lines, known event names only, and no secret in any line."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeGuard

import httpx
import pytest
import structlog

import receiver
from receiver.observability import logging as logs
from receiver.observability.logging import SECRET_WORDS, configure, flush, redact

PACKAGE: Final = Path(receiver.__file__).parent
_OURS: Final = ("", "httpx", "httpcore")
_LEVELS: Final = {"debug", "info", "warning", "error", "exception", "critical"}


@pytest.fixture
def out() -> Iterator[io.StringIO]:
    """Yield a stream to log to, and restore the logging configuration afterwards."""
    loggers = [logging.getLogger(name) for name in _OURS]
    levels = [logger.level for logger in loggers]
    handlers = logging.getLogger().handlers[:]
    before = structlog.get_config().copy()
    hooks = sys.unraisablehook, threading.excepthook
    with io.StringIO() as stream:
        yield stream
        logging.getLogger().handlers[:] = handlers
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        structlog.configure(**before)
        sys.unraisablehook, threading.excepthook = hooks
        logging.captureWarnings(capture=False)


def text(out: io.StringIO) -> str:
    """Return what was logged, once all of it is written."""
    assert flush(10)
    return out.getvalue()


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text(out).splitlines()]


EVENTS: Final = {
    "bill": "failed",
    "cancel": "failed",
    "clock": "skewed stepped",
    "dashboard": "action",
    "event": "unmatched",
    "handler": "attempt held interrupted missing paused registered released resumed stuck waiting",
    "handlers": "kept reloaded",
    "housekeeping": "failed interrupted",
    "later": "dropped",
    "lease": "unrenewed",
    "log": "dropped",
    "loop": "blocked interrupted stuck",
    "news": "interrupted",
    "order": "refused",
    "outcome": "taken",
    "poll": "failed",
    "prediction": "erased expired",
    "predictions": "deleted",
    "provider": "locked unlocked",
    "published": "failed fetched",
    "reader": "cut",
    "receiver": "started stopped stopping unstarted",
    "replay": "ended started",
    "request": "failed handled limited",
    "route": "failed registered slow",
    "schema": "waiting",
    "settings": "warning",
    "source": "failed registered",
    "step": "unkept",
    "store": "parameters pooled recovered saved unavailable",
    "stream": "connected lost unknown",
    "submit": "accepted postponed rejected unconfirmed",
    "task": "failed",
    "wake": "failed",
}
"""All event names of the receiver: users search and alert by them, so they must not change."""


def logged() -> dict[str, list[str]]:
    """Find every `log.<level>("…")` of the package, with the places where it is."""
    found: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        if "emulator" in path.relative_to(PACKAGE).parts:
            continue  # another program, with logs of its own
        for node in ast.walk(ast.parse(path.read_text())):
            if _is_log_call(node):
                place = f"{path.relative_to(PACKAGE)}:{node.lineno}"
                found.setdefault(_event(node, place), []).append(place)
    return found


def _is_log_call(node: ast.AST) -> TypeGuard[ast.Call]:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=level)):
            return level in _LEVELS
        case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="log" | "_log"), attr=level)):
            return level in _LEVELS
    return False


def _event(node: ast.Call, place: str) -> str:
    assert node.args, f"{place} logs no event name"
    first = node.args[0]
    assert isinstance(first, ast.Constant), f"{place} makes up its event name"
    return str(first.value)


def test_all_log_event_names_are_on_the_list() -> None:
    known = {f"{noun}.{verb}" for noun, verbs in EVENTS.items() for verb in verbs.split()}
    assert logged().keys() == known


def test_no_log_call_has_a_field_name_that_is_redacted() -> None:
    named = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {word.arg}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if _is_log_call(node)
        for word in node.keywords
        if word.arg and any(secret in word.arg.lower() for secret in SECRET_WORDS)
    ]
    assert not named


@pytest.mark.parametrize("word", SECRET_WORDS)
def test_field_named_like_a_secret_is_redacted(word: str) -> None:
    fields = {word: "hush", f"X-{word.upper()}-Y": "hush", "event": "a.b", "other": "seen"}
    hidden = redact(None, "info", dict(fields))
    assert "hush" not in str(hidden)
    assert hidden["other"] == "seen"
    assert hidden.keys() == fields.keys()


def test_json_line_has_time_level_event_and_fields(out: io.StringIO) -> None:
    configure("json", "info", out)
    structlog.get_logger().info("a.b", prediction="pred_1", number=7, text='a "line"\nend')
    [line] = lines(out)
    assert line.pop("time").endswith("Z")
    assert line == {
        "event": "a.b",
        "level": "info",
        "prediction": "pred_1",
        "number": 7,
        "text": 'a "line"\nend',
    }


def test_value_without_a_json_form_is_written_as_text(out: io.StringIO) -> None:
    configure("json", "info", out)
    structlog.get_logger().info("a.b", path=object, error=ValueError("no"), big=10**400)
    [line] = lines(out)
    assert (line["path"], line["error"]) == ("<class 'object'>", "ValueError('no')")


class Unsayable:
    def __repr__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize("form", ["console", "json"])
def test_value_that_cannot_be_formatted_is_named_by_its_type(out: io.StringIO, form: str) -> None:
    within: list[object] = []
    within.append(within)
    configure(form, "info", out)
    for value in (Unsayable(), within):
        structlog.get_logger().info("a.b", value=value, number=7)
    assert flush(10)
    first, second = out.getvalue().splitlines()
    assert all("a.b" in line and "7" in line for line in (first, second))
    assert "Unsayable" in first


def test_exception_is_logged_on_one_line(out: io.StringIO) -> None:
    configure("json", "info", out)
    try:
        raise ValueError("no")  # noqa: TRY301 - a traceback is wanted
    except ValueError:
        structlog.get_logger().exception("task.failed")
    [line] = lines(out)
    assert line["level"] == "error"
    assert line["exception"].endswith("ValueError: no")


def test_bound_context_is_in_every_line(out: io.StringIO) -> None:
    configure("json", "info", out)
    with structlog.contextvars.bound_contextvars(delivery="dlv_1"):
        structlog.get_logger().info("a.b")
        logging.getLogger("other").warning("theirs")
    assert [line["delivery"] for line in lines(out)] == ["dlv_1", "dlv_1"]


@pytest.mark.parametrize("bound", [{"api_key": "hush"}, {"Authorization": "Bearer hush"}])
def test_secret_is_redacted_in_both_log_formats(out: io.StringIO, bound: Mapping[str, str]) -> None:
    for form in ("json", "console"):
        configure(form, "info", out)
        structlog.get_logger().info("a.b", **bound)
        with structlog.contextvars.bound_contextvars(**bound):
            logging.getLogger("other").warning("theirs")
    assert text(out).count("**********") == 4
    assert "hush" not in text(out)


@pytest.mark.parametrize(
    ("level", "heard"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_log_level_applies_to_structlog_and_standard_logging(
    out: io.StringIO, level: str, heard: list[str]
) -> None:
    configure("json", level, out)
    ours, theirs = structlog.get_logger(), logging.getLogger("other.library")
    for name in ("debug", "info", "warning", "error"):
        getattr(ours, name)("a.b")
        getattr(theirs, name)("theirs")
    said = lines(out)
    assert [line["level"] for line in said if line["event"] == "a.b"] == heard
    assert [line["level"] for line in said if line["event"] == "theirs"] == heard


def test_standard_logging_lines_name_their_logger(out: io.StringIO) -> None:
    configure("json", "info", out)
    # Not uvicorn's own logger: servers of other tests in this process set its level.
    logging.getLogger("some.server").info("started on %s", "port 1")
    [line] = lines(out)
    assert (line["event"], line["logger"]) == ("started on port 1", "some.server")
    assert "time" in line


def test_configuring_twice_does_not_duplicate_lines(out: io.StringIO) -> None:
    configure("json", "info", out)
    configure("json", "info", out)
    logging.getLogger("other").warning("once")
    assert len(lines(out)) == 1


@pytest.mark.parametrize("level", ["debug", "info"])
def test_requested_urls_are_not_logged(out: io.StringIO, level: str) -> None:
    configure("json", level, out)
    transport = httpx.MockTransport(lambda _: httpx.Response(200))
    with httpx.Client(transport=transport) as client:
        client.post("https://queue.fal.example/m?fal_webhook=https%3A%2F%2Fh%2Fhush")
    assert text(out) == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_format_follows_the_stream_unless_it_is_set(out: io.StringIO) -> None:
    configure(None, "info", out)
    structlog.get_logger().info("a.b")
    assert lines(out)[0]["event"] == "a.b"
    for form, is_json in ((None, False), ("console", False), ("json", True)):
        terminal = Terminal()
        configure(form, "info", terminal)
        structlog.get_logger().info("a.b", field="seen")
        assert text(terminal).startswith("{") == is_json
        assert "seen" in text(terminal)


def test_log_goes_to_standard_error_by_default(
    out: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    assert out.getvalue() == ""
    configure("json", "info")
    structlog.get_logger().info("a.b")
    assert flush(10)
    said = capsys.readouterr()
    assert said.out == ""
    assert json.loads(said.err)["event"] == "a.b"


@pytest.mark.usefixtures("out")
@pytest.mark.parametrize("width", [80, 120])
def test_console_lines_fit_the_width_and_start_with_the_key_fields(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    configure("console", "info", terminal)
    ids = {"prediction": f"pred_{'0199f3a6' * 4}", "event_id": f"evt_{'0199f3a6' * 4}"}
    fields = {"provider": "eachlabs", "model": "google-nano-banana-pro-with-a-name", **ids}
    log = structlog.get_logger()
    log.info("outcome.taken", **fields, outcome="succeeded", status="succeeded", channel="webhook")
    log.warning("handler.attempt", **fields, state="dead", reason="no " * 60)
    log.error("handlers.kept", exception="syn.py:1:7: invalid syntax\n    x = :\n        ^")
    first, second, third, *below = text(terminal).splitlines()
    model = "google-nano…" if width == 80 else "google-nano-banana-pro-with-a-name"
    assert first[9:].startswith(
        f"info  outcome.taken   eachlabs {model} succeeded pred_0199f3a60199"
    )
    assert len(first) <= width
    assert re.match(r"\d\d:\d\d:\d\d warn  handler\.attempt eachlabs google-\S* dead pred_", second)
    assert "no " * 59 in second  # warnings are not truncated, and the reason comes first
    assert second.index(" reason=") < second.index(" event_id=")
    assert f"prediction={ids['prediction']}" in second
    assert third[9:] == "error handlers.kept"
    assert below == ["    syn.py:1:7: invalid syntax", "        x = :", "            ^"]


@pytest.mark.parametrize("form", ["console", "json"])
def test_logged_text_cannot_inject_terminal_escapes(out: io.StringIO, form: str) -> None:
    words = "\x1b]0;owned\x07\x9b31m\u202eevil\u200b\x7f\n2026-01-01 forged"
    configure(form, "info", out)
    error = ValueError(words)
    structlog.get_logger().error("poll.failed", reason=words, words=[words], exc_info=error)
    logging.getLogger("of.others").warning(words)
    assert flush(10)
    shown = out.getvalue()
    assert shown.count("evil") >= 3
    assert [char for char in shown if not char.isprintable() and char != "\n"] == []
    assert not any(line.startswith("2026-01-01 forged") for line in shown.splitlines())


# --- a reader that stalls ---


class Pipe:
    """A pipe that is not read until the test reads it."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.reader = os.fdopen(reading, "rb", buffering=0)
        self.out = os.fdopen(writing, "w")

    def read_until(self, word: str) -> str:
        """Read until a line with this word."""
        found = b""
        while word.encode() not in found or not found.endswith(b"\n"):
            found += self.reader.read(65536)
        return found.decode()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    made = Pipe()
    yield made
    made.reader.close()  # a writer that still waits gets an error now
    flush(10)
    made.out.close()


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.usefixtures("out")
def test_stalled_log_reader_drops_lines_instead_of_blocking(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(logs, "_MAX_QUEUED", 300_000)
    configure(form, "info", pipe.out)
    for number in range(5_000):  # this must not block
        structlog.get_logger().info("a.b", number=number, text="x" * 200)
        logging.getLogger("other").warning("theirs %d", number)
    assert not flush(0.01)
    said = pipe.read_until("log.dropped")
    kept = [int(one) for one in re.findall(r"theirs (\d+)", said)]
    assert kept == list(range(len(kept)))
    [line] = [line for line in said.splitlines() if "log.dropped" in line]
    [dropped] = re.findall(r"lines\W+(\d+)", line)
    assert int(dropped) == 10_000 - said.count("a.b") - len(kept)
    structlog.get_logger().info("a.last")
    assert "log.dropped" not in pipe.read_until("a.last")


@pytest.mark.usefixtures("out")
def test_lines_lost_to_a_full_device_are_counted_and_reported(pipe: Pipe) -> None:
    configure("json", "info", pipe.out)
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        working = os.dup(pipe.out.fileno())
        os.dup2(full.fileno(), pipe.out.fileno())
        for _ in range(3):
            structlog.get_logger().info("a.lost")
            assert flush(10)
        os.dup2(working, pipe.out.fileno())
        os.close(working)
    structlog.get_logger().info("a.kept")
    said = [json.loads(line) for line in pipe.read_until("log.dropped").splitlines()]
    assert [line["event"] for line in said] == ["a.kept", "log.dropped"]
    assert said[-1]["lines"] == 3


def test_flush_to_a_closed_stream_does_not_count_as_a_write(out: io.StringIO) -> None:
    configure("json", "info", out)
    out.close()
    logging.getLogger("other").warning("lost")
    with structlog.testing.capture_logs() as lines:
        assert flush(10)
        assert flush(10)
    assert not lines


@pytest.mark.usefixtures("out")
def test_non_blocking_stream_is_written_completely(pipe: Pipe) -> None:
    os.set_blocking(pipe.out.fileno(), False)
    configure("json", "info", pipe.out)
    for number in range(2_000):
        structlog.get_logger().info("a.b", number=number)
    structlog.get_logger().info("a.last")
    said = [json.loads(line) for line in pipe.read_until("a.last").splitlines()]
    assert [line.get("number") for line in said] == [*range(2_000), None]


def test_unraisable_and_thread_exceptions_are_logged(out: io.StringIO) -> None:
    class Bad:
        def __del__(self) -> None:
            raise ValueError("unraisable")

    def fails() -> None:
        raise ValueError("in a thread")

    configure("json", "info", out)
    bad = Bad()
    del bad
    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    said = [line["exception"].rpartition(": ")[2] for line in lines(out)]
    assert said == ["unraisable", "in a thread"]


def test_forked_process_writes_only_its_own_lines(out: io.StringIO, pipe: Pipe) -> None:
    assert out.getvalue() == ""
    configure("json", "info", pipe.out)
    structlog.get_logger().info("a.parent")
    child = os.fork()
    if not child:
        structlog.get_logger().info("a.child")
        flush(10)
        os._exit(0)
    os.waitpid(child, 0)
    structlog.get_logger().info("a.last")
    said = [json.loads(line)["event"] for line in pipe.read_until("a.last").splitlines()]
    assert sorted(said) == ["a.child", "a.last", "a.parent"]
