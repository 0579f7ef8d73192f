"""`command` runs a program, and nothing of it outlives its attempt."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
import time
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
from receiver.model.errors import HandlerError
from receiver.model.retry import Failure
from receiver.model.sealing import Seals
from receiver.store.deliveries import Claim
from receiver.testing import Kit, make_event, run
from tests.handlers.parts import built_in
from tests.patience import PATIENCE

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
    """Give the handler's file, set to run some lines of Python; -S starts faster."""

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
    """Tell whether a process runs; one that only waits to be counted does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_gone(pid: int) -> None:
    until = time.monotonic() + PATIENCE
    while is_alive(pid):
        assert time.monotonic() < until, f"{pid} is still there"


# --- what it is given ---


def test_the_event_comes_on_standard_input(
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
def test_other_ends_are_told_too(
    python: Program, receiver_kit: Kits, tmp_path: Path, kind: Any
) -> None:
    kit = receiver_kit(python("import sys; open('event', 'w').write(sys.stdin.read())"))
    assert kit.deliver(make_event(kind)).delivery.state == "done"
    assert read(tmp_path / "event")["prediction"]["status"] == kind


def test_the_provider_s_own_payload_comes_if_it_is_wanted(
    python: Program, receiver_kit: Kits, tmp_path: Path
) -> None:
    file = python("import sys; open('event', 'w').write(sys.stdin.read())", raw="1")
    receiver_kit(file).deliver(make_event())
    assert read(tmp_path / "event")["raw"]["status"] == "OK"


def test_the_environment_is_bare(
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
    assert set(found) - ours - theirs <= {"LC_CTYPE"}  # which Python sets for itself


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_no_file_of_ours_is_open_in_it(
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
    # The fourth is how it lists them.
    assert set(read(tmp_path / "fds")) == {"0", "1", "2", "3"}


def test_no_shell_runs_it(
    monkeypatch: pytest.MonkeyPatch, receiver_kit: Kits, tmp_path: Path
) -> None:
    kit = receiver_kit(use(monkeypatch, "echo '$HOME' \"a  b\" > file; touch file *"))
    delivered = kit.deliver(make_event())
    assert delivered.delivery.history[0]["note"] == "$HOME a  b > file; touch file *\n"
    assert list(tmp_path.iterdir()) == []


def test_a_program_of_the_folder_is_found(
    monkeypatch: pytest.MonkeyPatch, receiver_kit: Kits, tmp_path: Path
) -> None:
    script = tmp_path / "run"
    script.write_text("#!/bin/sh\npwd\n")
    script.chmod(0o755)
    delivered = receiver_kit(use(monkeypatch, "./run")).deliver(make_event())
    assert delivered.delivery.history[0]["note"] == f"{tmp_path.resolve()}\n"


# --- what becomes of it ---


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
def test_the_exit_status_decides(
    monkeypatch: pytest.MonkeyPatch, script: str, state: str, reason: str
) -> None:
    result = run(handler(sh(monkeypatch, script)), make_event())
    assert (result.state, result.reason) == (state, reason)


def handler(file: str) -> Callable[..., Any]:
    return load([file]).handlers["command"].function


def test_it_is_tried_again_until_it_works(
    monkeypatch: pytest.MonkeyPatch, receiver_kit: Kits
) -> None:
    kit = receiver_kit(sh(monkeypatch, "echo $RECEIVER_ATTEMPT; test $RECEIVER_ATTEMPT = 3"))
    delivered = kit.deliver(make_event())
    kit.exhaust(delivered)
    history = [(tried["reason"], tried["note"]) for tried in delivered.delivery.history]
    assert delivered.delivery.state == "done"
    assert history == [("exit 1: 1", "1\n"), ("exit 1: 2", "2\n"), ("", "3\n")]


def test_it_runs_once_after_a_crash_that_came_before(
    monkeypatch: pytest.MonkeyPatch, receiver_kit: Kits, tmp_path: Path
) -> None:
    kit = receiver_kit(sh(monkeypatch, "echo >> ran"))
    assert kit.crash_after_ack(make_event()).delivery.state == "done"
    assert (tmp_path / "ran").read_text() == "\n"


def test_it_does_not_run_again_after_a_crash(
    monkeypatch: pytest.MonkeyPatch, receiver_kit: Kits, tmp_path: Path
) -> None:
    kit = receiver_kit(sh(monkeypatch, "echo >> ran"))
    assert kit.crash_after_run(make_event()).delivery.state == "done"
    assert (tmp_path / "ran").read_text() == "\n"


# --- programs that behave badly ---


def test_it_need_not_read_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    large = make_event(input={"prompt": 1_000_000 * "x"})
    assert run(handler(sh(monkeypatch, "exec <&-; exit 0")), large).state == "done"


def test_much_output_is_read_to_its_end_and_its_end_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = "head -c 100000000 /dev/zero | tr '\\0' 'x'; echo; echo the end; exit 3"
    result = run(handler(sh(monkeypatch, script)), make_event())
    assert result.reason == "exit 3: the end"
    assert result.note == 3991 * "x" + "\nthe end\n"


def test_output_that_is_no_text_is_kept_as_far_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(handler(sh(monkeypatch, r"printf 'a\377\000\303b\n'; exit 3")), make_event())
    assert result.reason == "exit 3: a\ufffd\\x00\ufffdb"
    assert result.note == "a\ufffd\\x00\ufffdb\n"


def test_a_child_that_keeps_the_output_open_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "sleep 600 & echo $! > pid; echo fine"
    begun = time.monotonic()
    result = run(handler(sh(monkeypatch, script)), make_event())
    assert time.monotonic() - begun < PATIENCE
    assert (result.state, result.note) == ("done", "fine\n")
    assert_gone(int((tmp_path / "pid").read_text()))


def test_a_child_that_has_nothing_of_ours_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "sleep 600 >/dev/null 2>&1 & echo $! > pid"
    assert run(handler(sh(monkeypatch, script)), make_event()).state == "done"
    pid = int((tmp_path / "pid").read_text())
    assert is_alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_all_of_it_ends_when_it_takes_too_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "sleep 600 >/dev/null & echo $! > pid; echo at work; wait"
    result = run(handler(sh(monkeypatch, script, timeout="0.2")), make_event())
    assert (result.state, result.reason) == ("pending", "longer than 0.2 s: at work")
    assert_gone(int((tmp_path / "pid").read_text()))


def test_who_does_not_mind_sigterm_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "trap 'echo no' TERM; echo $$ > pid; while :; do sleep 600; done"
    begun = time.monotonic()
    result = run(handler(sh(monkeypatch, script, timeout="0.2")), make_event())
    assert time.monotonic() - begun >= 2.2
    assert result.reason == "longer than 0.2 s: no"
    assert_gone(int((tmp_path / "pid").read_text()))


def test_it_ends_with_its_attempt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "trap '' TERM; echo $$ > pid; echo at work; while :; do sleep 600; done"
    failure, note = uvloop.run(tried(sh(monkeypatch, script), seconds=0.3))
    assert failure is not None
    assert failure.kind == "timeout"
    # The loop ended before the two seconds were over, and no one else would have come back to it.
    assert_gone(int((tmp_path / "pid").read_text()))
    assert note == "at work\n"


async def tried(file: str, seconds: float | None) -> tuple[Failure | None, str]:
    """Run one attempt, stopped after some time."""
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


# --- what cannot be run ---


def test_a_program_that_has_gone_is_tried_again(
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


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        ("", {}, "needs COMMAND"),
        ("  ", {}, "needs COMMAND"),
        ("echo 'open", {}, "every quote closed"),
        ("no-such-program-at-all x", {}, "'no-such-program-at-all' is not a program"),
        ("./plain", {}, "'./plain' is not a program"),
        ("true", {"timeout": "soon"}, "COMMAND_TIMEOUT must be a number"),
        ("true", {"timeout": "0"}, "COMMAND_TIMEOUT must be a number"),
        ("true", {"timeout": "nan"}, "COMMAND_TIMEOUT must be a number"),
        ("true", {"timeout": "inf"}, "COMMAND_TIMEOUT must be a number"),
        ("true", {"dir": "/no/such/folder"}, "COMMAND_DIR"),
    ],
)
def test_senseless_settings_cannot_be_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, more: dict[str, str], said: str
) -> None:
    (tmp_path / "plain").write_text("#!/bin/sh\n")
    with pytest.raises(HandlerError, match=said):
        load([use(monkeypatch, command, **more)])


def test_the_attempt_may_take_longer_than_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    [found] = load([use(monkeypatch, "true", timeout="90")]).handlers.values()
    assert found.timeout > 90 + 2
