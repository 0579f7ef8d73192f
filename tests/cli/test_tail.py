"""`receiver tail` prints events as lines or JSON, and reconnects after lost connections."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from rich.console import Console

from receiver.cli.client import Client, ClientError
from receiver.cli.tail import follow, show
from receiver.emulator import settings_for
from tests.cli.running import SECRET, environment, inside
from tests.cli.test_cli import start
from tests.loopback import free_port
from tests.patience import PATIENCE

KEY: Final = {"RECEIVER_API_KEY": "key"}


def said(*places: int) -> str:
    return "".join(f'id: {n}\nevent: prediction.queued\ndata: {{"n": {n}}}\n\n' for n in places)


class Script(httpx.BaseTransport):
    """A transport that gives scripted answers in turn, and records each Last-Event-ID."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self._answers = iter(answers)
        self.asked: list[str | None] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.headers.get("last-event-id"))
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def stream(*parts: str | Exception) -> httpx.Response:
    class Parts(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for part in parts:
                if isinstance(part, Exception):
                    raise part
                yield part.encode()

    return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Parts())


def followed(script: Script, after: int | None = None) -> tuple[list[int], list[float], list[str]]:
    """Follow until the script ends; return the sequence numbers, the waits, and the notices."""
    places: list[int] = []
    waits: list[float] = []
    notices: list[str] = []
    messages = follow(Client(KEY, script, waits.append), after, on_loss=notices.append)
    with suppress(RuntimeError):  # raised by the generator at the end of the script
        for message in messages:
            places.append(message["seq"])  # noqa: PERF401 - those before the end count
    return places, waits, notices


def test_lost_connection_resumes_from_the_last_event_id_with_backoff() -> None:
    script = Script(
        stream(": live\n\n", said(1, 2), httpx.ReadError("cut")),
        httpx.ConnectError("connection refused"),
        httpx.Response(503),
        stream(said(3), ": still here\n\n"),
        stream(said(4), "id: 5\nevent: prediction.qu"),  # truncated, so not an event
    )
    places, waits, notices = followed(script)
    assert places == [1, 2, 3, 4]
    assert script.asked == [None, "2", "2", "2", "3", "4"]
    assert waits == [0.5, 1.0, 2.0, 0.5, 0.5]
    assert "cut" in notices[0]


def test_reconnect_before_the_first_message_misses_no_event() -> None:
    begun = stream(": live\n", httpx.ReadError("cut"))
    begun.headers["last-event-id"] = "41"
    script = Script(begun, stream(said(42)))
    assert followed(script)[0] == [42]
    assert script.asked == [None, "41", "42"]


def test_tail_starts_after_the_given_event_id() -> None:
    script = Script(stream())
    followed(script, 7)
    assert script.asked[0] == "7"


@pytest.mark.parametrize("status", [401, 404, 422])
def test_http_401_404_or_422_ends_the_tail(status: int) -> None:
    problem = httpx.Response(status, json={"detail": "it says why"})
    client = Client(KEY, Script(problem))
    with pytest.raises(ClientError, match="it says why"):
        next(follow(client, None))


def line(message: dict[str, Any], *, colours: bool = False) -> str:
    out = io.StringIO()
    show(
        Console(file=out, force_terminal=colours, color_system="standard" if colours else None),
        message,
    )
    return out.getvalue()


EVENT: Final[dict[str, Any]] = {
    "seq": 5,
    "event": "prediction.failed",
    "time": "2026-01-02T03:04:05.678Z",
    "channel": "webhook",
    "prediction": {
        "id": "pred_1",
        "provider": "fal",
        "model": "fal-ai/x",
        "error": {"code": "provider_error", "message": "[red]boom[/red]"},
    },
}


def test_event_line_shows_its_fields_and_ignores_markup() -> None:
    text = line(EVENT)
    for word in ("03:04:05", "failed", "pred_1", "fal-ai/x", "webhook", "[red]boom[/red]"):
        assert word in text
    assert text.count("\n") == 1
    assert "\x1b[31m" in line(EVENT, colours=True)
    assert "\x1b" not in text


ATTEMPT: Final[dict[str, Any]] = {
    "seq": 5,
    "event": "delivery.pending",
    "time": "2026-01-02T03:04:05.678Z",
    "delivery": {
        "id": "dlv_1",
        "handler": "save",
        "state": "pending",
        "number": 2,
        "result": "error",
        "reason": "ConnectionError: [red]boom[/red]",
        "due_at": "2026-01-02T03:04:09.778Z",
    },
    "prediction": {"id": "pred_1", "provider": "fal", "model": "fal-ai/x", "status": "succeeded"},
}


def test_delivery_line_shows_the_attempt_and_the_next_retry() -> None:
    said = line(ATTEMPT).split("  ")
    assert [word.strip() for word in said if word.strip()] == [
        "03:04:05", "pending", "pred_1", "fal", "fal-ai/x", "save #2",
        "error: ConnectionError: [red]boom[/red]", "again in 4s",
    ]  # fmt: skip
    dead = {**ATTEMPT["delivery"], "state": "dead", "due_at": None}
    text = line({**ATTEMPT, "event": "delivery.dead", "delivery": dead}, colours=True)
    assert "again" not in text
    assert "\x1b[31mdead" in text


def test_gap_in_the_stream_is_printed() -> None:
    assert "between 3 and 9" in line({"event": "stream.gap", "after": 3, "until": 9})


def test_tail_follows_a_receiver_that_is_killed_and_restarted(tmp_path: Path) -> None:
    emulator_port, port = free_port(), free_port()
    emulator = start("emulate", "--seconds", "0.05", port=emulator_port, cwd=tmp_path)
    env = {
        **settings_for(f"http://127.0.0.1:{emulator_port}"),
        "RECEIVER_SECRET_KEY": SECRET,
        "RECEIVER_API_KEYS": "key",
        "RECEIVER_PUBLIC_URL": f"http://127.0.0.1:{port}",
        "FAL_KEY": "f",
    }
    caller = {"RECEIVER_URL": f"http://127.0.0.1:{port}", **KEY}
    server = start("serve", port=port, cwd=tmp_path, **env)
    tail = subprocess.Popen(
        [sys.executable, "-m", "receiver", "tail", "--json", "--after", "0", "--count", "8"],
        cwd=tmp_path,
        env=environment(caller),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    submit = ("submit", "fal", "fal-ai/x", "prompt=a fox", "--wait", "--metadata", "n=1")
    try:
        names = [json.loads(inside(*submit, cwd=tmp_path, **caller).stdout)["id"]]
        server.kill()
        server.wait()
        server = start("serve", port=port, cwd=tmp_path, **env)
        names.append(json.loads(inside(*submit, cwd=tmp_path, **caller).stdout)["id"])
        text, _ = tail.communicate(timeout=PATIENCE)
        plain = inside(
            "tail", "--after", "0", "--count", "2", "--type", "succeeded", "--metadata", "n=1",
            cwd=tmp_path, **caller,
        )  # fmt: skip
    finally:
        tail.kill()
        for process in (server, emulator):
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)
    messages = [json.loads(row) for row in text.splitlines()]
    heard = [(m["prediction"]["id"], m["event"].rpartition(".")[2]) for m in messages]
    assert heard == [
        (name, status)
        for name in names
        for status in ("queued", "submitting", "processing", "succeeded")
    ]
    assert tail.returncode == 0
    assert [row.split()[2] for row in plain.stdout.splitlines()] == names
