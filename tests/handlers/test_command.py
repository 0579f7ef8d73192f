"""`command` runs a program, and ends its processes with the attempt."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import uvloop

from receiver import Output
from receiver.deliveries.attempt import Attempt
from receiver.deliveries.context import Tools
from receiver.deliveries.importing import load
from receiver.model.retry import Failure
from receiver.model.sealing import Seals
from receiver.store.deliveries import Claim
from receiver.testing import Kit, make_event, run
from tests.handlers.parts import built_in
from tests.journey.parts import eventually

Kits = Callable[..., Kit]
Program = Callable[..., str]

SECRET: Final = "the-receiver-keeps-this-to-itself"


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TIMEOUT", "ENV", "RAW"):
        monkeypatch.delenv(f"COMMAND_{name}", raising=False)
    monkeypatch.setenv("COMMAND_DIR", str(tmp_path))
    monkeypatch.setenv("RECEIVER_SECRET_KEY", SECRET)


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> Program:
    """Return a function that sets COMMAND to run Python code and returns the handler's file.

    Python starts faster with -S.
    """

    def python(code: str, *arguments: str, **more: str) -> str:
        command = shlex.join([sys.executable, "-I", "-S", "-c", code, *arguments])
        return use(monkeypatch, command, **more)

    return python


def use(monkeypatch: pytest.MonkeyPatch, command: str, **more: str) -> str:
    monkeypatch.setenv("COMMAND", command)
    for name, value in more.items():
        monkeypatch.setenv(f"COMMAND_{name.upper()}", value)
    return built_in("command")


def sh(monkeypatch: pytest.MonkeyPatch, script: str, **more: str) -> str:
    return use(monkeypatch, shlex.join(["/bin/sh", "-c", script]), **more)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_gone(pid: int) -> None:
    eventually(lambda: not is_alive(pid))


# --- input and environment ---


def test_event_is_passed_on_standard_input(
    python: Program, receiver_kit: Kits, tmp_path: Path
) -> None:
    file = python("import sys; open('event', 'w').write(sys.stdin.read()); print('kept')")
    outputs = ["https://cdn.example/a.png", "https://cdn.example/b.mp4"]
    metadata = {"note": '$(touch pwned) `x` "\u202e', "odd": [1, None, {"a": True}]}
    delivered = receiver_kit(file).deliver(make_event(output=outputs, metadata=metadata), times=2)
    assert delivered.delivery.state == "done"
    event = read(tmp_path / "event")
    assert event["type"] == "prediction.succeeded"
    assert event["prediction"]["id"] == delivered.prediction_id
    assert event["prediction"]["metadata"] == metadata
    assert [output["url"] for output in event["prediction"]["output"]] == outputs
    assert "raw" not in event
    assert sorted(path.name for path in tmp_path.iterdir()) == ["event"]


@pytest.mark.parametrize("kind", ["failed", "canceled"])
def test_program_runs_for_failed_and_canceled_predictions(
    python: Program, receiver_kit: Kits, tmp_path: Path, kind: Any
) -> None:
    kit = receiver_kit(python("import sys; open('event', 'w').write(sys.stdin.read())"))
    assert kit.deliver(make_event(kind)).delivery.state == "done"
    assert read(tmp_path / "event")["prediction"]["status"] == kind


def test_raw_payload_is_included_if_command_raw_is_set(
    python: Program, receiver_kit: Kits, tmp_path: Path
) -> None:
    file = python("import sys; open('event', 'w').write(sys.stdin.read())", raw="1")
    receiver_kit(file).deliver(make_event())
    assert read(tmp_path / "event")["raw"]["status"] == "OK"


def test_environment_has_only_allowed_variables_and_no_secrets(
    python: Program, receiver_kit: Kits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANTED", "yes")
    monkeypatch.setenv("FAL_KEY", SECRET)
    monkeypatch.setenv("TZ", "UTC")
    code = "import json, os; json.dump(dict(os.environ), open('environment', 'w'))"
    delivered = receiver_kit(python(code, env="WANTED, MISSING")).deliver(make_event())
    found = read(tmp_path / "environment")
    assert SECRET not in str(found)
    assert (found["WANTED"], found["TZ"]) == ("yes", "UTC")
    assert found["RECEIVER_EVENT_ID"] == f"evt_{delivered.prediction_id[5:]}"
    assert found["RECEIVER_DELIVERY_KEY"] == delivered.delivery.id
    assert found["RECEIVER_ATTEMPT"] == "1"
    ours = {"WANTED", "RECEIVER_EVENT_ID", "RECEIVER_DELIVERY_KEY", "RECEIVER_ATTEMPT"}
    theirs = {"PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ"}
    assert set(found) - ours - theirs <= {"LC_CTYPE"}  # set by Python itself


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_program_inherits_no_open_files(
    python: Program, tmp_path: Path, runner: Callable[[Any], None]
) -> None:
    file = python("import os, json; json.dump(os.listdir('/proc/self/fd'), open('fds', 'w'))")
    ours, other = os.pipe()
    os.set_inheritable(ours, True)
    try:
        runner(tried(file, seconds=None))
    finally:
        os.close(ours)
        os.close(other)
    # File descriptor 3 is the one that lists the folder.
    assert set(read(tmp_path / "fds")) == {"0", "1", "2", "3"}


def test_command_is_not_run_by_a_shell(
    monkeypatch: pytest.MonkeyPatch, receiver_kit: Kits, tmp_path: Path
) -> None:
    kit = receiver_kit(use(monkeypatch, "echo '$HOME' \"a  b\" > file; touch file *"))
    delivered = kit.deliver(make_event())
    assert delivered.delivery.history[0]["note"] == "$HOME a  b > file; touch file *\n"
    assert list(tmp_path.iterdir()) == []


def test_program_in_command_dir_is_found(
    monkeypatch: pytest.MonkeyPatch, receiver_kit: Kits, tmp_path: Path
) -> None:
    script = tmp_path / "run"
    script.write_text("#!/bin/sh\npwd\n")
    script.chmod(0o755)
    delivered = receiver_kit(use(monkeypatch, "./run")).deliver(make_event())
    assert delivered.delivery.history[0]["note"] == f"{tmp_path.resolve()}\n"


# --- outcome of an attempt ---


@pytest.mark.parametrize(
    ("script", "state", "reason"),
    [
        ("echo fine", "done", ""),
        ("echo no such order >&2; exit 65", "dead", "exit 65: no such order"),
        ("echo a; echo busy; exit 75", "pending", "exit 75: busy"),
        ("echo a; echo; echo last; echo; exit 3", "pending", "exit 3: last"),
        ("exit 1", "pending", "exit 1"),
        ("kill -KILL $$", "pending", "ended by SIGKILL"),
        ("echo oh; kill -ABRT $$", "pending", "ended by SIGABRT: oh"),
        ("printf '%0999d' 7; exit 3", "pending", "exit 3: " + 300 * "0"),
    ],
)
def test_exit_status_determines_the_delivery_state(
    monkeypatch: pytest.MonkeyPatch, script: str, state: str, reason: str
) -> None:
    result = run(handler(sh(monkeypatch, script)), make_event())
    assert (result.state, result.reason) == (state, reason)


def handler(file: str) -> Callable[..., Any]:
    return load([file]).handlers["command"].function


def test_failing_program_is_retried_until_it_succeeds(
    monkeypatch: pytest.MonkeyPatch, receiver_kit: Kits
) -> None:
    kit = receiver_kit(sh(monkeypatch, "echo $RECEIVER_ATTEMPT; test $RECEIVER_ATTEMPT = 3"))
    delivered = kit.deliver(make_event())
    kit.exhaust(delivered)
    history = [(tried["reason"], tried["note"]) for tried in delivered.delivery.history]
    assert delivered.delivery.state == "done"
    assert history == [("exit 1: 1", "1\n"), ("exit 1: 2", "2\n"), ("", "3\n")]


def test_crash_before_the_handler_runs_starts_the_program_once(
    monkeypatch: pytest.MonkeyPatch, receiver_kit: Kits, tmp_path: Path
) -> None:
    kit = receiver_kit(sh(monkeypatch, "echo >> ran"))
    assert kit.crash_after_ack(make_event()).delivery.state == "done"
    assert (tmp_path / "ran").read_text() == "\n"


def test_crash_after_the_handler_ran_does_not_start_the_program_again(
    monkeypatch: pytest.MonkeyPatch, receiver_kit: Kits, tmp_path: Path
) -> None:
    kit = receiver_kit(sh(monkeypatch, "echo >> ran"))
    assert kit.crash_after_run(make_event()).delivery.state == "done"
    assert (tmp_path / "ran").read_text() == "\n"


# --- programs that behave badly ---


def test_program_need_not_read_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    large = make_event(input={"prompt": 1_000_000 * "x"})
    assert run(handler(sh(monkeypatch, "exec <&-; exit 0")), large).state == "done"


def test_large_output_is_read_completely_and_only_its_end_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = "head -c 100000000 /dev/zero | tr '\\0' 'x'; echo; echo the end; exit 3"
    result = run(handler(sh(monkeypatch, script)), make_event())
    assert result.reason == "exit 3: the end"
    assert result.note == 3991 * "x" + "\nthe end\n"


def test_output_that_is_not_utf8_is_kept_with_replacements(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(handler(sh(monkeypatch, r"printf 'a\377\000\303b\n'; exit 3")), make_event())
    assert result.reason == "exit 3: a\ufffd\\x00\ufffdb"
    assert result.note == "a\ufffd\\x00\ufffdb\n"


def test_child_that_holds_the_output_open_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "sleep 600 & echo $! > pid; echo fine"
    result = run(handler(sh(monkeypatch, script)), make_event())
    assert (result.state, result.note) == ("done", "fine\n")
    assert_gone(int((tmp_path / "pid").read_text()))


def test_child_that_closed_the_output_is_left_running(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "sleep 600 >/dev/null 2>&1 & echo $! > pid"
    assert run(handler(sh(monkeypatch, script)), make_event()).state == "done"
    pid = int((tmp_path / "pid").read_text())
    try:
        assert is_alive(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_timeout_ends_all_processes_of_the_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "sleep 600 >/dev/null & echo $! > pid; echo at work; wait"
    result = run(handler(sh(monkeypatch, script, timeout="2")), make_event())
    assert (result.state, result.reason) == ("pending", "longer than 2 s: at work")
    assert_gone(int((tmp_path / "pid").read_text()))


def test_program_that_ignores_sigterm_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "trap 'echo no' TERM; echo $$ > pid; while :; do sleep 600; done"
    result = run(handler(sh(monkeypatch, script, timeout="2")), make_event())
    assert result.reason == "longer than 2 s: no"
    assert_gone(int((tmp_path / "pid").read_text()))


def test_program_is_killed_when_its_attempt_times_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "trap '' TERM; echo $$ > pid; echo at work; while :; do sleep 600; done"
    failure, note = uvloop.run(tried(sh(monkeypatch, script), seconds=2.0))
    assert failure is not None
    assert failure.kind == "timeout"
    # The loop ended before the 2 seconds of grace: the cancelled wait must have sent SIGKILL.
    assert_gone(int((tmp_path / "pid").read_text()))
    assert note == "at work\n"


async def tried(file: str, seconds: float | None) -> tuple[Failure | None, str]:
    """Run one attempt with a timeout."""
    event = make_event(output=[Output(url="https://cdn.example/a.png")])
    claim = Claim(id="dlv_1", handler="command", attempt=1, round=0, number=1, event=event)
    async with httpx.AsyncClient() as http:
        tools = Tools(Memory(), never, http, http, Seals(["a-key"]))
        attempt = Attempt(load([file]).handlers["command"], claim, tools, seconds)
        return await attempt.run(), attempt.note


class Memory:
    async def recall(self, *_: str) -> None: ...
    async def remember(self, *given: str) -> str:
        return given[-1]

    async def annotate(self, _: Any) -> None: ...


async def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("it submits nothing")


# --- programs that cannot run ---


def test_missing_or_unexecutable_program_is_retried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "run"
    script.write_text("no program at all")
    script.chmod(0o755)
    function = handler(use(monkeypatch, "./run"))
    result = run(function, make_event())
    assert result.state == "pending"
    assert "Exec format error" in result.reason
    script.chmod(0o644)
    assert "Permission denied" in run(function, make_event()).reason
    script.unlink()
    assert "No such file" in run(function, make_event()).reason


def test_attempt_timeout_is_longer_than_the_program_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [found] = load([use(monkeypatch, "true", timeout="90")]).handlers.values()
    assert found.timeout > 90 + 2
