"""A failing test of a handler shows the reason in about ten lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from textwrap import dedent, indent
from typing import Any

import pytest

from receiver import Dead, Event, Retry, on
from receiver.testing import Kit, make_event
from tests.patience import PATIENCE

Kits = Callable[..., Kit]
Told = dict[str, list[str]]
_HANDLERS = """
from receiver import Context, Event, on
from receiver.testing import make_event

def find(rooms):
    return rooms["lobby"]

@on("succeeded", name="mine/async")
async def later(event, ctx):
    ctx.log.info("not told")
    find({})

@on("succeeded", name="mine/plain")
def plain(event, ctx):
    ctx.log.warning("careful", status=0)
    try:
        find({})
    except KeyError:
        ctx.log.exception("no room")

@on("succeeded", name="mine/group")
async def group(event):
    raise ExceptionGroup("all of it", [ValueError("one"), TypeError("two")])
"""


_FAILING = {
    "exhausts": """
        kit = receiver_kit(later)
        kit.exhaust(kit.deliver(make_event()))
    """,
    "warns": "receiver_kit(plain).deliver(make_event())",
    "captures": """
        from structlog.testing import capture_logs
        kit = receiver_kit(later)
        with capture_logs() as lines: kit.deliver(make_event())
        print([line["event"] for line in lines if line["event"] == "not told"])
    """,
    "groups": "receiver_kit(group).deliver(make_event())",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Return the captured output of each test in `_FAILING`, all of which fail."""
    folder = tmp_path_factory.mktemp("failing")
    text = _HANDLERS
    for name, body in _FAILING.items():
        lines = indent(f"{dedent(body).strip()}\nassert False", "    ")
        text += f"\ndef test_{name}(receiver_kit):\n{lines}\n"
    path = folder / "test_it.py"
    path.write_text(text)
    options = ["-q", "-p", "no:cacheprovider", "-p", "receiver.testing.plugin"]
    run = [sys.executable, "-m", "pytest", *options, "--rootdir", str(folder), str(path)]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # other plugins load slowly
    done = subprocess.run(
        run, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert f"{len(_FAILING)} failed" in done.stdout, done.stdout
    shown = re.split("^=+ short test", done.stdout.replace(f"{folder}/", ""), flags=re.MULTILINE)[0]
    parts = re.split(r"^_+ test_(\w+) _+\n", shown, flags=re.MULTILINE)[1:]
    return {
        name: part.partition("Captured stdout call")[2].rstrip("\n").split("\n")[1:]
        for name, part in zip(parts[::2], parts[1::2], strict=True)
    }


def test_repeated_error_shows_its_traceback_once(told: Told) -> None:
    why = "reason=KeyError: 'lobby'"
    assert [line for line in told["exhausts"] if "~" not in line] == [
        f"warning: handler.attempt handler=mine/async attempt=1 result=error state=pending {why}",
        '  File "test_it.py", line 11, in later',
        "    find({})",
        '  File "test_it.py", line 6, in find',
        '    return rooms["lobby"]',
        "KeyError: 'lobby'",
        f"warning: handler.attempt handler=mine/async attempt=10 result=error state=dead {why}",
    ]


def test_warnings_and_exceptions_logged_by_a_handler_are_shown(told: Told) -> None:
    lines = told["warns"]
    assert lines[:2] == [
        "warning: careful handler=mine/plain status=0",
        "error: no room handler=mine/plain",
    ]
    assert lines[-1] == "KeyError: 'lobby'"
    assert len(lines) <= 10


def test_log_lines_below_warning_can_still_be_captured(told: Told) -> None:
    assert told["captures"] == ["['not told']"]


def test_all_errors_of_an_exception_group_are_shown(told: Told) -> None:
    assert told["groups"][-2:] == ["ValueError: one", "TypeError: two"]
    assert len(told["groups"]) <= 10


@on("succeeded", name="mine/no")
def no(_: Event) -> None:
    raise Dead("no such room")


@on("succeeded", name="mine/busy", after="mine/no")
def busy(_: Event) -> None:
    raise Retry("busy", after=60)


@on("failed", name="mine/other")
def other(_: Event) -> None: ...


def test_repr_shows_the_state_and_reason_of_a_delivery() -> None:
    with Kit(no, other) as kit:
        delivered = kit.deliver(make_event())
        delivery = "<Delivery mine/no dead, 1 attempt: no such room>"
        assert repr(delivered.delivery) == delivery
        assert repr(delivered) == f"<Delivered fal fal-ai/nano-banana succeeded: {delivery}>"
    assert repr(delivered) == f"<Delivered {delivered.prediction_id}>"


def test_repr_shows_the_last_error_of_a_pending_delivery(receiver_kit: Kits) -> None:
    delivered = receiver_kit(busy).deliver(make_event())
    assert repr(delivered.delivery) == "<Delivery mine/busy pending, 1 attempt: busy>"


def test_repr_inside_a_handler_does_not_deadlock(receiver_kit: Kits) -> None:
    known: list[Any] = []
    told: list[str] = []

    @on("*", name="mine/looks")
    async def looks(_: Event) -> None:
        told.extend(map(repr, known))

    kit = receiver_kit(looks)
    known.append(kit.deliver(make_event()))
    kit.deliver(make_event())
    assert told == [f"<Delivered {known[0].prediction_id}>"]


def test_event_without_a_matching_handler_explains_why(receiver_kit: Kits) -> None:
    delivered = receiver_kit(other).deliver(make_event())
    why = r"no handler has had prediction.succeeded: mine/other \(type is prediction.succeeded\)"
    with pytest.raises(ValueError, match=why):
        _ = delivered.delivery
    assert "mine/other (type is prediction.succeeded)" in repr(delivered)


def test_delivery_property_raises_if_there_are_several(receiver_kit: Kits) -> None:
    delivered = receiver_kit(no, busy).deliver(make_event())
    with pytest.raises(ValueError, match="several deliveries: <Delivery mine/"):
        _ = delivered.delivery


def test_delivery_property_raises_if_there_is_no_handler(receiver_kit: Kits) -> None:
    with pytest.raises(ValueError, match="there is none"):
        _ = receiver_kit().deliver(make_event()).delivery
