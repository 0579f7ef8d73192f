"""`receiver replay` in bulk from a terminal, against a scripted API."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import typer

from receiver.cli.client import Client, ClientError
from receiver.cli.replay import moment, replay_all
from receiver.model.errors import ReceiverError

NOW = 1_750_000_000.0
COUNTED = {"id": "rep_1", "state": "counted", "matched": 9, "events": 4, "replayed": 0}


class Api(Client):
    """A client that gets scripted answers in turn, and records the requests."""

    def __init__(self, *answers: Any) -> None:
        super().__init__({"RECEIVER_API_KEY": "key"}, httpx.MockTransport(self._answer))
        self._answers: Iterator[Any] = iter(answers)
        self.asked: list[tuple[str, bytes]] = []

    def _answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.url.path, request.content))
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(200, json={**COUNTED, **answer})


RUNNING = {"state": "running", "replayed": 5}
DONE = {"state": "done", "replayed": 9}
WANTED = {"state": "dead"}


def no_time(_: float) -> None: ...


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return a function that simulates a terminal with these answers, and returns the questions."""

    def sit(*answers: bool) -> list[str]:
        asked: list[str] = []
        left = iter(answers)

        def confirm(question: str) -> bool:
            asked.append(question)
            return next(left)

        for stream in (sys.stdin, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda: True)
        monkeypatch.setattr(typer, "confirm", confirm)
        return asked

    return sit


Sit = Callable[..., list[str]]
Captured = pytest.CaptureFixture[str]


def test_replay_counts_asks_starts_and_shows_progress(terminal: Sit, capsys: Captured) -> None:
    api, asked = Api({}, RUNNING, RUNNING, DONE), terminal(True)
    assert replay_all(api, WANTED, yes=False, sleep=no_time)["state"] == "done"
    paths = ["", "/rep_1/start", "/rep_1", "/rep_1"]
    assert [path for path, _ in api.asked] == [f"/v1/replays{path}" for path in paths]
    assert json.loads(api.asked[0][1]) == WANTED
    assert asked == ["Redeliver them?"]
    said = capsys.readouterr().out
    assert said.startswith("rep_1: 9 deliveries of 4 events would be redelivered")
    assert "100%" in said
    assert "done: 9 deliveries redelivered" in said.rpartition("100%")[2]


@pytest.mark.parametrize(("matched", "answers"), [(9, [False]), (0, [])])
def test_declined_or_empty_replay_is_canceled(
    terminal: Sit, matched: int, answers: list[bool]
) -> None:
    api = Api({"matched": matched}, {"state": "canceled"})
    terminal(*answers)
    assert replay_all(api, WANTED, yes=False, sleep=no_time)["state"] == "canceled"
    assert [path for path, _ in api.asked][1:] == ["/v1/replays/rep_1/cancel"]


def test_replay_without_a_terminal_starts_only_with_yes(capsys: Captured) -> None:
    api = Api({}, {"state": "canceled"})
    with pytest.raises(ReceiverError, match="pass --yes"):
        replay_all(api, WANTED, yes=False, sleep=no_time)
    assert [path for path, _ in api.asked][1:] == ["/v1/replays/rep_1/cancel"]
    assert replay_all(Api({}, RUNNING, DONE), WANTED, yes=True, sleep=no_time)["state"] == "done"
    assert "%" not in capsys.readouterr().out


def interrupt(_: float) -> None:
    raise KeyboardInterrupt


def test_interrupt_offers_to_cancel_the_replay(terminal: Sit, capsys: Captured) -> None:
    api = Api({}, RUNNING, {"state": "canceled", "replayed": 6})
    terminal(True, True)
    assert replay_all(api, WANTED, yes=False, sleep=interrupt)["replayed"] == 6
    assert "canceled: 6 deliveries redelivered" in capsys.readouterr().out


def test_interrupted_replay_can_be_left_running(terminal: Sit, capsys: Captured) -> None:
    api, _ = Api({}, RUNNING), terminal(True, False)
    assert replay_all(api, WANTED, yes=False, sleep=interrupt)["state"] == "running"
    assert "it goes on; `receiver replays --cancel rep_1` ends it" in capsys.readouterr().out


def test_interrupt_after_the_replay_ended_returns_its_result() -> None:
    api = Api({}, RUNNING, ClientError("replay-ended", "the replay has ended"), DONE)
    assert replay_all(api, WANTED, yes=True, sleep=interrupt)["state"] == "done"
    api = Api({}, RUNNING, ClientError("unreachable", "connection refused"), RUNNING)
    with pytest.raises(ClientError, match="connection refused"):
        replay_all(api, WANTED, yes=True, sleep=interrupt)


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
def test_time_is_given_as_a_timestamp_or_an_age(text: str, time: str) -> None:
    assert moment(text, NOW) == time


@pytest.mark.parametrize("text", ["-5m", "yesterday", "2025-06-15T12:00:00", "24", ""])
def test_invalid_time_is_rejected_with_an_example(text: str) -> None:
    with pytest.raises(ReceiverError, match="write 24h"):
        moment(text, NOW)


def test_time_before_year_1_is_rejected() -> None:
    with pytest.raises(ReceiverError, match="before the year 1"):
        moment("999999w", NOW)
