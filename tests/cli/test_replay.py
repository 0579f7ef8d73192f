"""Replaying in bulk from a terminal, against an API that is told what to say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from receiver.cli.replay import moment, replay
from receiver.client import ClientError
from receiver.model.errors import ReceiverError

NOW = 1_750_000_000.0
COUNTED = {"id": "rep_1", "state": "counted", "matched": 9, "events": 4, "replayed": 0}


class Api:
    """Answers in turn, and keeps what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self._answers: Iterator[Any] = iter(answers)
        self.asked: list[tuple[str, Any]] = []

    def get(self, path: str) -> Any:
        return self.post(path)

    def post(self, path: str, body: Any = None) -> Any:
        self.asked.append((path, body))
        answer = next(self._answers)
        if isinstance(answer, BaseException):
            raise answer
        return {**COUNTED, **answer}


class Terminal:
    """Answers every question alike."""

    def __init__(self, *answers: bool) -> None:
        self._answers = iter(answers)
        self.said: list[str] = []
        self.shown: list[tuple[int, int]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def ask(self, question: str) -> bool:
        self.said.append(question)
        return next(self._answers)

    def progress(self, done: int, total: int) -> None:
        self.shown.append((done, total))


RUNNING = {"state": "running", "replayed": 5}
DONE = {"state": "done", "replayed": 9}
WANTED = {"state": "dead"}


def no_time(_: float) -> None: ...


def test_it_counts_asks_begins_and_shows_how_far_it_is() -> None:
    api, terminal = Api({}, RUNNING, RUNNING, DONE), Terminal(True)
    assert replay(api, terminal, WANTED, no_time)["state"] == "done"
    paths = ["", "/rep_1/start", "/rep_1", "/rep_1"]
    assert [path for path, _ in api.asked] == [f"/v1/replays{path}" for path in paths]
    assert api.asked[0][1] == WANTED
    assert terminal.said[0] == "rep_1: 9 deliveries of 4 events would be redelivered"
    assert terminal.said[-1] == "done: 9 deliveries redelivered"
    assert terminal.shown == [(5, 9), (5, 9), (9, 9)]


@pytest.mark.parametrize(("matched", "answers"), [(9, [False]), (0, [])])
def test_what_is_not_wanted_after_all_is_dropped(matched: int, answers: list[bool]) -> None:
    api = Api({"matched": matched}, {"state": "canceled"})
    assert replay(api, Terminal(*answers), WANTED, no_time)["state"] == "canceled"
    assert [path for path, _ in api.asked][1:] == ["/v1/replays/rep_1/cancel"]


def interrupt(_: float) -> None:
    raise KeyboardInterrupt


def test_an_interrupt_offers_to_cancel() -> None:
    api = Api({}, RUNNING, {"state": "canceled", "replayed": 6})
    terminal = Terminal(True, True)
    assert replay(api, terminal, WANTED, interrupt)["replayed"] == 6
    assert terminal.said[-1] == "canceled: 6 deliveries redelivered"


def test_an_interrupt_may_leave_it_at_work() -> None:
    api, terminal = Api({}, RUNNING), Terminal(True, False)
    assert replay(api, terminal, WANTED, interrupt)["state"] == "running"
    assert terminal.said[-1] == "it goes on; `receiver replays --cancel rep_1` ends it"


def test_an_interrupt_may_come_too_late() -> None:
    api = Api({}, RUNNING, ClientError("the replay has ended"), DONE)
    assert replay(api, Terminal(True, True), WANTED, interrupt)["state"] == "done"
    api = Api({}, RUNNING, ClientError("nobody is there"), RUNNING)
    with pytest.raises(ClientError, match="nobody"):
        replay(api, Terminal(True, True), WANTED, interrupt)


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("10s", "2025-06-15T15:06:30+00:00"),
        ("5m", "2025-06-15T15:01:40+00:00"),
        ("24h", "2025-06-14T15:06:40+00:00"),
        ("7d", "2025-06-08T15:06:40+00:00"),
        ("2w", "2025-06-01T15:06:40+00:00"),
        ("2025-06-15T12:00:00Z", "2025-06-15T12:00:00+00:00"),
    ],
)
def test_a_time_is_a_time_or_how_long_ago(text: str, time: str) -> None:
    assert moment(text, NOW) == time


@pytest.mark.parametrize("text", ["-5m", "yesterday", "2025-06-15T12:00:00", "24", ""])
def test_what_is_no_time_is_said_with_what_is(text: str) -> None:
    with pytest.raises(ReceiverError, match="write 24h"):
        moment(text, NOW)


def test_a_time_before_all_years_is_refused() -> None:
    with pytest.raises(ReceiverError, match="before there were any years"):
        moment("999999w", NOW)
