"""A test that fails shows why in about ten lines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from receiver import Dead, Event, Retry, on
from receiver.testing import Kit, make_event
from tests.patience import PATIENCE

Kits = Callable[..., Kit]
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


def _failing(folder: Path, body: str) -> list[str]:
    """Return what pytest captured of a test that fails."""
    lines = ["def test_it(receiver_kit):", *(f"    {line}" for line in body.split("\n"))]
    path = folder / "test_it.py"
    path.write_text("\n".join([_HANDLERS, *lines, "    assert False"]))
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "no:schemathesis"]
    run = [sys.executable, "-m", "pytest", *options, "--rootdir", str(folder), str(path)]
    done = subprocess.run(
        run, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert "1 failed" in done.stdout, done.stdout
    told = done.stdout.partition("Captured stdout call")[2].partition("=== short test")[0]
    return told.replace(f"{folder}/", "").split("\n")[1:-1]


def test_an_error_is_told_once_with_the_lines_of_the_handler(tmp_path: Path) -> None:
    body = "kit = receiver_kit(later)\nkit.exhaust(kit.deliver(make_event()))"
    told = [line for line in _failing(tmp_path, body) if "~" not in line]
    why = "reason=KeyError: 'lobby'"
    assert told == [
        f"warning: handler.attempt handler=mine/async attempt=1 result=error state=pending {why}",
        '  File "test_it.py", line 11, in later',
        "    find({})",
        '  File "test_it.py", line 6, in find',
        '    return rooms["lobby"]',
        "KeyError: 'lobby'",
        f"warning: handler.attempt handler=mine/async attempt=10 result=error state=dead {why}",
    ]


def test_a_handlers_own_warnings_are_told(tmp_path: Path) -> None:
    told = _failing(tmp_path, "receiver_kit(plain).deliver(make_event())")
    assert told[:2] == [
        "warning: careful handler=mine/plain status=0",
        "error: no room handler=mine/plain",
    ]
    assert told[-1] == "KeyError: 'lobby'"
    assert len(told) <= 10


def test_lines_below_a_warning_can_still_be_captured(tmp_path: Path) -> None:
    body = "from structlog.testing import capture_logs\nkit = receiver_kit(later)\n"
    body += "with capture_logs() as lines: kit.deliver(make_event())\n"
    body += "print([line['event'] for line in lines if line['event'] == 'not told'])"
    assert _failing(tmp_path, body) == ["['not told']"]


def test_all_errors_of_a_group_are_told(tmp_path: Path) -> None:
    told = _failing(tmp_path, "receiver_kit(group).deliver(make_event())")
    assert told[-2:] == ["ValueError: one", "TypeError: two"]
    assert len(told) <= 10


@on("succeeded", name="mine/no")
def no(_: Event) -> None:
    raise Dead("no such room")


@on("succeeded", name="mine/busy", after="mine/no")
def busy(_: Event) -> None:
    raise Retry("busy")


@on("failed", name="mine/other")
def other(_: Event) -> None: ...


def test_a_repr_says_how_it_stands() -> None:
    with Kit(no, other) as kit:
        delivered = kit.deliver(make_event())
        delivery = "<Delivery mine/no dead, 1 attempt: no such room>"
        assert repr(delivered.delivery) == delivery
        assert repr(delivered) == f"<Delivered fal fal-ai/nano-banana succeeded: {delivery}>"
    assert repr(delivered) == f"<Delivered {delivered.prediction_id}>"


def test_a_repr_has_the_last_error_of_what_is_still_tried(receiver_kit: Kits) -> None:
    delivered = receiver_kit(busy).deliver(make_event())
    assert repr(delivered.delivery) == "<Delivery mine/busy pending, 1 attempt: busy>"


def test_a_repr_in_a_handler_does_not_wait_for_itself(receiver_kit: Kits) -> None:
    known: list[Any] = []
    told: list[str] = []

    @on("*", name="mine/looks")
    async def looks(_: Event) -> None:
        told.extend(map(repr, known))

    kit = receiver_kit(looks)
    known.append(kit.deliver(make_event()))
    kit.deliver(make_event())
    assert told == [f"<Delivered {known[0].prediction_id}>"]


def test_an_event_that_nobody_wanted_says_why(receiver_kit: Kits) -> None:
    delivered = receiver_kit(other).deliver(make_event())
    why = r"no handler has had prediction.succeeded: mine/other \(type is prediction.succeeded\)"
    with pytest.raises(ValueError, match=why):
        _ = delivered.delivery
    assert "mine/other (type is prediction.succeeded)" in repr(delivered)


def test_one_of_several_deliveries_is_not_chosen(receiver_kit: Kits) -> None:
    delivered = receiver_kit(no, busy).deliver(make_event())
    with pytest.raises(ValueError, match="several deliveries: <Delivery mine/"):
        _ = delivered.delivery


def test_where_there_is_no_handler_at_all(receiver_kit: Kits) -> None:
    with pytest.raises(ValueError, match="there is none"):
        _ = receiver_kit().deliver(make_event()).delivery
