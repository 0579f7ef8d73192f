"""The handlers that come with the receiver, run from a real store against real servers."""

import asyncio
import base64
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
import pytest
from standardwebhooks import Webhook, WebhookVerificationError
from structlog.testing import capture_logs

from receiver.dispatch.embedded import Dispatch, Pace
from receiver.dispatch.fetch import guarded_client
from receiver.dispatch.registry import Registry, load
from receiver.dispatch.runner import Tools
from receiver.errors import HandlerError
from receiver.model import Error, Event, Outcome, Output, Policy, Prediction, Status
from receiver.store.sqlite import SQLiteStore
from receiver.store.values import Arrival, Delivery, NewPrediction, Owed, Ruling

pytestmark = pytest.mark.anyio

HANDLERS: Final = Path(__file__).parents[2] / "handlers"
PATIENCE: Final = 10.0
PNG: Final = b"\x89PNG\r\n\x1a\n" + bytes(range(64))
SECRET: Final = "whsec_" + base64.b64encode(b"a secret of some thirty-two bytes").decode()
OTHER: Final = "whsec_" + base64.b64encode(b"its successor is as long as it is").decode()


@pytest.fixture(autouse=True)
def lines() -> Any:
    with capture_logs() as lines:
        yield lines


def built_in(name: str) -> Registry:
    """Load a handler's file anew, under the settings of now."""
    return load([str(HANDLERS / f"{name}.py")])


@dataclass
class Asked:
    """One request, as a server got it."""

    path: str
    headers: dict[str, str]
    body: bytes


Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Server:
    """Answers from a script, then always with its last answer."""

    url: str
    answers: list[Answer]
    asked: list[Asked] = field(default_factory=list)

    def next(self) -> Answer:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@asynccontextmanager
async def serving(*answers: Answer) -> AsyncIterator[Server]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {
            name.lower(): value for name, value in (line.split(": ", 1) for line in head[1:-2])
        }
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        server.asked.append(Asked(head[0].split()[1], headers, body))
        status, more, content = server.next()
        given = {"content-length": str(len(content)), "connection": "close", **more}
        lines = [f"HTTP/1.1 {status} Answer", *(f"{k}: {v}" for k, v in given.items()), "", ""]
        writer.write("\r\n".join(lines).encode() + content)
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    server = Server(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/hook", list(answers))
    try:
        yield server
    finally:
        listening.close()
        await listening.wait_closed()


class Running:
    """Handlers at work on what a store owes them."""

    def __init__(self, store: SQLiteStore, registry: Registry, dispatch: Dispatch) -> None:
        self.store = store
        self.dispatch = dispatch
        self.handlers = tuple(registry.handlers)

    async def deliver(self, outcome: Outcome, *states: str) -> Delivery:
        """End a prediction with `outcome` and wait for what its one handler makes of it."""
        prediction_id = await self._end(outcome)
        self.dispatch.wake(self.handlers)
        return await self.ends(prediction_id, *states)

    async def replay(self, prediction_id: str) -> Delivery:
        await self.store.replay(prediction_id, lambda *_: Owed(self.handlers), time.time())
        self.dispatch.wake(self.handlers)
        return await self.ends(prediction_id)

    async def ends(self, prediction_id: str, *states: str) -> Delivery:
        wanted = states or ("done", "skipped", "dead")
        async with asyncio.timeout(PATIENCE):
            while True:
                [delivery] = (await self.store.deliveries(10, prediction=prediction_id)).data
                if delivery.state in wanted and delivery.history:
                    found: Delivery = delivery
                    return found
                await asyncio.sleep(0.01)

    async def _end(self, outcome: Outcome) -> str:
        prediction_id = f"pred_{1:032d}"
        await self.store.create(
            NewPrediction(
                id=prediction_id,
                provider="fal",
                model="fal-ai/flux",
                mode="queue",
                input={"prompt": "a cat"},
                metadata={"kind": "avatar"},
                created_at=time.time(),
            )
        )
        status = Status.SUCCEEDED if outcome.error is None else Status.FAILED
        ruling = Ruling(
            verdict="accepted",
            status=status,
            reason="",
            event_type=f"prediction.{status}",  # type: ignore[arg-type]
            owed=Owed(self.handlers),
        )
        await self.store.accept(
            Arrival(
                prediction_id=prediction_id,
                provider="fal",
                channel="webhook",
                outcome=outcome,
                at=time.time(),
                judge=lambda _known, _arrival: ruling,
                body=b'{"the payload": "of the provider"}',
            )
        )
        return prediction_id


async def no_submit(*_: Any, **__: Any) -> Prediction:
    raise NotImplementedError


@asynccontextmanager
async def running(folder: Path, registry: Registry) -> AsyncIterator[Running]:
    store = SQLiteStore(str(folder / "receiver.db"), lambda _: None)
    store.open()
    async with httpx.AsyncClient() as http, guarded_client(allow_private=True) as results:
        dispatch = Dispatch(
            store,
            registry,
            Tools(store, no_submit, http, results),
            owner="me",
            policy=Policy(attempts=3, base=0, cap=0),
            pace=Pace(nap=0.2, beat=0.1),
        )
        await dispatch.start()
        try:
            yield Running(store, registry, dispatch)
        finally:
            await dispatch.stop()
            store.close()


def succeeded(*urls: str | None) -> Outcome:
    return Outcome(
        kind="succeeded", output=[Output(url=url, text=None if url else "words") for url in urls]
    )


FAILED: Final = Outcome(kind="failed", error=Error(code="content_policy", message="no"))


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (succeeded("https://x.example/1"), ("prediction.succeeded", 1, None)),
        (succeeded(), ("prediction.succeeded", 0, None)),
        (FAILED, ("prediction.failed", 0, "content_policy")),
    ],
)
async def test_log_writes_one_line_for_every_outcome(
    tmp_path: Path, lines: list[Any], outcome: Outcome, expected: tuple[str, int, str | None]
) -> None:
    async with running(tmp_path, built_in("log")) as receiver:
        assert (await receiver.deliver(outcome)).state == "done"
    [line] = [line for line in lines if line["event"].startswith("prediction.")]
    assert (line["event"], line["outputs"], line["error"]) == expected
    assert (line["provider"], line["handler"], line["channel"]) == ("fal", "log", "webhook")
    assert line["prediction"].startswith("pred_")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "results" / "deeper"
    monkeypatch.setenv("SAVE_DIR", str(folder))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Give what is in a folder, which may not be there."""
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def image(content: bytes = PNG, kind: str = "application/octet-stream") -> Answer:
    return 200, {"content-type": kind}, content


async def test_save_keeps_every_file_under_a_name_that_says_what_it_is(
    tmp_path: Path, results: Path
) -> None:
    second = b"\xff\xd8\xff" + bytes(10)
    async with (
        serving(image(), image(second)) as server,
        running(tmp_path, built_in("save")) as receiver,
    ):
        delivery = await receiver.deliver(succeeded(server.url, None, server.url))
    assert delivery.state == "done"
    assert contents(results) == {
        f"{delivery.prediction_id}-0-{hashlib.sha256(PNG).hexdigest()[:12]}.png": PNG,
        f"{delivery.prediction_id}-1-{hashlib.sha256(second).hexdigest()[:12]}.jpg": second,
    }


async def test_save_fetches_again_only_what_it_does_not_have(tmp_path: Path, results: Path) -> None:
    async with (
        serving(image(), (503, {}, b""), image(PNG + b"2")) as server,
        running(tmp_path, built_in("save")) as receiver,
    ):
        delivery = await receiver.deliver(succeeded(server.url, server.url))
        assert [attempt["result"] for attempt in delivery.history] == ["error", "done"]
        assert len(server.asked) == 3
        assert len(contents(results)) == 2
        await receiver.replay(delivery.prediction_id)
        assert len(server.asked) == 5  # a replay means to do it all again


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (image(b"<html>", "text/html"), "output 0 is 6 bytes of text/html"),
        (image(b"", "image/png"), "output 0 is 0 bytes of image/png"),
        (image(b"x" * 5000, "image/png"), "more than 1000"),
        ((404, {}, b""), "gone"),
    ],
)
async def test_save_keeps_nothing_of_what_is_no_result(
    tmp_path: Path,
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Answer,
    words: str,
) -> None:
    monkeypatch.setenv("SAVE_MAX_BYTES", "1000")
    async with (
        serving(answer) as server,
        running(tmp_path, built_in("save")) as receiver,
    ):
        delivery = await receiver.deliver(succeeded(server.url))
    assert delivery.state == "dead"
    assert words in delivery.reason
    assert contents(results) == {}


async def test_save_accepts_the_types_it_is_told(
    tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVE_TYPES", "text/,application/json")
    async with (
        serving(image(b"words", "text/plain"), image(b"?", "application/json")) as server,
        running(tmp_path, built_in("save")) as receiver,
    ):
        assert (await receiver.deliver(succeeded(server.url, server.url))).state == "done"
    assert sorted(Path(name).suffix for name in contents(results)) == [".json", ".txt"]


async def test_save_leaves_no_half_of_a_file(tmp_path: Path, results: Path) -> None:
    cut = (200, {"content-length": "1000"}, PNG)
    async with (
        serving(cut) as server,
        running(tmp_path, built_in("save")) as receiver,
    ):
        delivery = await receiver.deliver(succeeded(server.url))
    assert [attempt["result"] for attempt in delivery.history] == ["error"] * 3
    assert contents(results) == {}


async def test_save_does_not_show_a_file_that_could_not_be_finished(
    tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(28, "No space left on device")

    async with (
        serving(image()) as server,
        running(tmp_path, built_in("save")) as receiver,
    ):
        monkeypatch.setattr("os.fsync", broken)
        delivery = await receiver.deliver(succeeded(server.url))
    assert delivery.state == "dead"
    assert "No space left" in delivery.reason
    assert [name for name in contents(results) if not name.startswith(".")] == []


@pytest.mark.parametrize("outcome", [succeeded(), succeeded(None)])
async def test_save_skips_what_has_no_file(tmp_path: Path, results: Path, outcome: Outcome) -> None:
    async with running(tmp_path, built_in("save")) as receiver:
        delivery = await receiver.deliver(outcome)
    assert (delivery.state, delivery.reason) == ("skipped", "no output has a URL")
    assert contents(results) == {}


Forward = Callable[[str], Registry]


@pytest.fixture
def forward(monkeypatch: pytest.MonkeyPatch) -> Forward:
    def load_for(url: str, secrets: str = SECRET) -> Registry:
        monkeypatch.setenv("FORWARD_URL", url)
        monkeypatch.setenv("FORWARD_SECRET", secrets)
        return built_in("forward")

    return load_for


OK: Final[Answer] = (204, {}, b"")


def verify(asked: Asked, secret: str) -> Any:
    """Check a signature as its receiver would."""
    return Webhook(secret).verify(asked.body, asked.headers)


async def test_forward_signs_what_it_sends(tmp_path: Path, forward: Forward) -> None:
    async with serving(OK) as server, running(tmp_path, forward(server.url)) as receiver:
        delivery = await receiver.deliver(succeeded("https://x.example/1"))
    assert delivery.state == "done"
    [asked] = server.asked
    assert asked.path == "/hook"
    message = verify(asked, SECRET)
    assert message["type"] == "prediction.succeeded"
    assert message["data"]["event_id"] == delivery.event_id
    assert message["data"]["prediction"]["id"] == delivery.prediction_id
    assert message["data"]["prediction"]["output"] == [{"url": "https://x.example/1"}]
    assert datetime.fromisoformat(message["timestamp"]).tzinfo is not None
    assert b"the payload" not in asked.body  # that of the provider may be large
    with pytest.raises(WebhookVerificationError):
        verify(asked, OTHER)
    with pytest.raises(WebhookVerificationError):
        verify(Asked(asked.path, asked.headers, asked.body + b" "), SECRET)


async def test_forward_tells_of_failures_too(tmp_path: Path, forward: Forward) -> None:
    async with serving(OK) as server, running(tmp_path, forward(server.url)) as receiver:
        assert (await receiver.deliver(FAILED)).state == "done"
    message = verify(server.asked[0], SECRET)
    assert message["data"]["prediction"]["error"] == {"code": "content_policy", "message": "no"}


async def test_forward_keeps_its_id_over_retries_and_changes_it_for_a_replay(
    tmp_path: Path, forward: Forward
) -> None:
    answers = [(500, {}, b""), (302, {"location": "/elsewhere"}, b""), OK]
    async with serving(*answers) as server, running(tmp_path, forward(server.url)) as receiver:
        delivery = await receiver.deliver(succeeded("https://x.example/1"))
        reasons = [attempt["reason"] for attempt in delivery.history]
        assert reasons == ["RuntimeError: HTTP 500", "RuntimeError: HTTP 302", ""]
        await receiver.replay(delivery.prediction_id)
    ids = [asked.headers["webhook-id"] for asked in server.asked]
    assert ids == [delivery.id] * 3 + [f"{delivery.id}.1"]
    for asked in server.asked:
        verify(asked, SECRET)


async def test_forward_signs_with_every_secret(tmp_path: Path, forward: Any) -> None:
    registry = forward("http://127.0.0.1:1", f"{SECRET}  {OTHER}")
    async with serving(OK) as server:
        registry = forward(server.url, f"{SECRET}  {OTHER}")
        async with running(tmp_path, registry) as receiver:
            await receiver.deliver(succeeded("https://x.example/1"))
    for secret in (SECRET, OTHER):
        verify(server.asked[0], secret)


async def test_forward_ends_where_the_other_side_wants_no_more(
    tmp_path: Path, forward: Forward
) -> None:
    async with (
        serving((410, {}, b"")) as server,
        running(tmp_path, forward(server.url)) as receiver,
    ):
        delivery = await receiver.deliver(succeeded("https://x.example/1"))
    assert (delivery.state, len(server.asked)) == ("dead", 1)
    assert "410" in delivery.reason


def in_an_hour() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
@pytest.mark.parametrize("after", ["3600", in_an_hour])
async def test_forward_comes_back_when_it_is_told(
    tmp_path: Path, forward: Forward, status: int, after: str | Callable[[], str]
) -> None:
    header = after if isinstance(after, str) else after()
    async with (
        serving((status, {"retry-after": header}, b"")) as server,
        running(tmp_path, forward(server.url)) as receiver,
    ):
        delivery = await receiver.deliver(succeeded("https://x.example/1"), "pending")
    assert delivery.due_at is not None
    wait = datetime.fromisoformat(delivery.due_at) - datetime.now(UTC)
    assert timedelta(seconds=3500) < wait <= timedelta(seconds=3601)
    assert delivery.reason == f"HTTP {status}"


@pytest.mark.parametrize("header", ["", "soon", "-5", "nan", "inf", "1e3", "Thu, 99 Foo 2020"])
async def test_forward_falls_back_on_the_policy_where_it_is_told_nonsense(
    tmp_path: Path, forward: Forward, header: str
) -> None:
    async with (
        serving((503, {"retry-after": header}, b"")) as server,
        running(tmp_path, forward(server.url)) as receiver,
    ):
        delivery = await receiver.deliver(succeeded("https://x.example/1"))
    reasons: Sequence[str] = [attempt["reason"] for attempt in delivery.history]
    assert reasons == ["RuntimeError: HTTP 503"] * 3


async def test_forward_does_not_wait_for_what_is_past(tmp_path: Path, forward: Forward) -> None:
    past = format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)
    async with (
        serving((503, {"retry-after": past}, b""), OK) as server,
        running(tmp_path, forward(server.url)) as receiver,
    ):
        assert (await receiver.deliver(succeeded("https://x.example/1"))).attempts == 2


@pytest.mark.parametrize(
    ("url", "secrets"),
    [("", SECRET), ("https://x.example/hook", ""), ("", ""), ("https://x.example/hook", "  ")],
)
def test_forward_without_its_settings_cannot_be_loaded(
    forward: Any, url: str, secrets: str
) -> None:
    with pytest.raises(HandlerError, match="FORWARD_URL and FORWARD_SECRET") as raised:
        forward(url, secrets)
    assert "forward.py:" in str(raised.value)


def test_forward_with_a_secret_that_is_none_cannot_be_loaded(forward: Any) -> None:
    with pytest.raises(HandlerError, match=r"forward\.py"):
        forward("https://x.example/hook", "whsec_not*base64")


def test_every_built_in_handler_has_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARD_URL", "https://x.example/hook")
    monkeypatch.setenv("FORWARD_SECRET", SECRET)
    names = [path.stem for path in HANDLERS.glob("*.py") if path.stem != "__init__"]
    found = [list(built_in(name).handlers) for name in names]
    assert found == [[name] for name in names]


def test_the_message_of_forward_is_plain_json(forward: Forward) -> None:
    module = forward("https://x.example/hook").handlers["forward"].function.__globals__
    now = datetime(2026, 1, 2, tzinfo=UTC)
    prediction = Prediction(
        id="pred_1",
        provider="fal",
        model="m",
        status=Status.SUCCEEDED,
        mode="queue",
        input={},
        metadata={},
        created_at=now,
    )
    event = Event(
        id="evt_1", type="prediction.succeeded", time=now, channel=None, prediction=prediction
    )
    message = msgspec.json.decode(msgspec.json.encode(module["message"](event)))
    assert message["timestamp"] == "2026-01-02T00:00:00Z"
    assert message["data"]["channel"] is None
