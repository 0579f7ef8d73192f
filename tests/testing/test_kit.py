"""The kit is a real receiver: it shows what would happen to a handler in production."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from receiver import (
    Call,
    Context,
    Dead,
    Door,
    Event,
    Output,
    Prediction,
    Reply,
    Retry,
    Unproved,
    on,
    route,
)
from receiver.emulator.providers import CALLING
from receiver.model.errors import HandlerError, SettingsError
from receiver.model.values import ErrorCode
from receiver.providers import DECLARED
from receiver.providers.adapter import Stopping
from receiver.settings import Settings
from receiver.testing import Kit, make_event

Kits = Callable[..., Kit]
PROVIDERS: dict[str, str] = {name: declared.example for name, declared in DECLARED.items()}
ADAPTERS = Settings.read({"RECEIVER_DEV": "1"}).adapters()
CHANNELS: dict[str, str] = {**dict.fromkeys(CALLING, "webhook"), "oxen": "sse"}


class Witness:
    """Records what a handler got and did, over all restarts of the receiver."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.posts: list[str] = []


@pytest.fixture
def witness() -> Witness:
    return Witness()


@pytest.fixture
def handler(witness: Witness) -> Callable[..., Any]:
    @on("*", name="kit/post")
    async def post(event: Event, ctx: Context) -> None:
        witness.events.append(event)
        await ctx.once("post", lambda: witness.posts.append(ctx.idempotency_key))

    return post


@pytest.mark.parametrize(
    ("provider", "kind"),
    [
        (name, kind)
        for name in PROVIDERS
        for kind in ("succeeded", "failed", "canceled")
        if kind != "canceled" or isinstance(ADAPTERS[name], Stopping)
    ],
)
def test_duplicate_callbacks_run_the_handler_once_with_the_given_event(
    receiver_kit: Kits, handler: Any, witness: Witness, provider: str, kind: Any
) -> None:
    given = make_event(kind, provider=provider, model=PROVIDERS[provider], metadata={"a": [1]})
    delivered = receiver_kit(handler).deliver(given, times=3)

    assert (delivered.delivery.state, delivered.delivery.attempts) == ("done", 1)
    [event] = witness.events
    assert event.type == given.type
    assert (event.prediction.id, event.id) == (delivered.prediction_id, delivered.delivery.event_id)
    for name in ("provider", "model", "input", "metadata", "output"):
        assert event.prediction[name] == given.prediction[name], name
    assert event.channel == ("poll" if kind == "canceled" else CHANNELS[provider])


@pytest.mark.parametrize(
    "code",
    ["provider_error", "content_policy", "timeout", "rejected", "expired", "unconfirmed"],
)
@pytest.mark.parametrize("provider", ["fal", "eachlabs"])
def test_failure_is_delivered_with_its_error_code(
    receiver_kit: Kits, handler: Any, provider: str, code: ErrorCode
) -> None:
    given = make_event("failed", provider=provider, model="m/n", error=(code, "it went wrong"))
    prediction = receiver_kit(handler).deliver(given).prediction
    assert prediction.error
    assert prediction.error.code == code


def test_fields_of_an_output_reach_the_prediction_unchanged(
    receiver_kit: Kits, handler: Any
) -> None:
    outputs = [Output(url="https://cdn.example/a.png", width=7), Output(url="https://x.example/b")]
    assert receiver_kit(handler).deliver(make_event(output=outputs)).prediction.output == outputs


@pytest.mark.parametrize("provider", PROVIDERS)
def test_lost_callback_is_replaced_by_a_poll(
    receiver_kit: Kits, handler: Any, provider: str
) -> None:
    event = make_event(provider=provider, model=PROVIDERS[provider])
    delivered = receiver_kit(handler).lose_callback(event)
    assert (delivered.prediction.channel, delivered.delivery.state) == ("poll", "done")


def test_crash_after_the_ack_loses_no_delivery(
    receiver_kit: Kits, handler: Any, witness: Witness
) -> None:
    delivered = receiver_kit(handler).crash_after_ack(make_event())
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("done", 1)
    assert len(witness.posts) == 1


def test_crash_after_a_run_repeats_the_handler_but_not_its_steps(
    receiver_kit: Kits, handler: Any, witness: Witness
) -> None:
    delivered = receiver_kit(handler).crash_after_run(make_event())
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("done", 2)
    assert (len(witness.events), len(witness.posts)) == (2, 1)


def test_crash_after_run_also_works_for_a_plain_handler(receiver_kit: Kits) -> None:
    runs = []

    @on("*", name="kit/plain")
    def plain(event: Event) -> None:
        runs.append(event.id)

    assert receiver_kit(plain).crash_after_run(make_event()).delivery.attempts == 2
    assert len(runs) == 2


def test_crash_after_run_fails_if_no_handler_returns(receiver_kit: Kits) -> None:
    @on("*", name="kit/raises")
    def raises(_: Event) -> None:
        raise Dead("no")

    with pytest.raises(AssertionError, match="no handler returned"):
        receiver_kit(raises).crash_after_run(make_event())


def test_moving_the_clock_starts_the_next_attempt(receiver_kit: Kits) -> None:
    @on("*", name="kit/later")
    def later(_: Event, ctx: Context) -> None:
        if ctx.attempt < 3:
            raise Retry("busy", after=600)

    kit = receiver_kit(later)
    delivered = kit.deliver(make_event())
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("pending", 1)
    kit.move(590)
    assert delivered.delivery.attempts == 1
    kit.move(11)
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("pending", 2)
    kit.exhaust(delivered)
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("done", 3)


def test_exhaust_uses_up_all_attempts_of_a_failing_handler(receiver_kit: Kits) -> None:
    @on("*", name="kit/broken", retry=Retry(attempts=4))
    def broken(_: Event) -> None:
        raise ValueError("again")

    kit = receiver_kit(broken)
    delivered = kit.deliver(make_event())
    kit.exhaust(delivered)
    assert (delivered.delivery.state, len(delivered.delivery.history)) == ("dead", 4)


def test_replay_has_a_new_idempotency_key(
    receiver_kit: Kits, handler: Any, witness: Witness
) -> None:
    kit = receiver_kit(handler)
    kit.replay(kit.deliver(make_event()))
    first, second = witness.posts
    assert second == f"{first}.1"


def test_notes_metadata_and_child_predictions_can_be_inspected(receiver_kit: Kits) -> None:
    @on("succeeded", name="kit/busy", model="first")
    async def busy(_: Event, ctx: Context) -> None:
        ctx.note("an earlier one")
        ctx.note("x" * 5000 + " the end\0")
        await ctx.annotate(seen=True)
        await ctx.submit("eachlabs", "second", {"prompt": "more"})

    delivered = receiver_kit(busy).deliver(make_event(model="first", provider="eachlabs"))
    [attempt] = delivered.delivery.history
    assert (len(attempt["note"]), attempt["note"][-12:]) == (4000, " the end\\x00")
    assert delivered.prediction.metadata == {"seen": True}
    [child] = delivered.children
    assert (child.model, child.depth, child.status) == ("second", 1, "processing")


def test_endless_chain_of_predictions_stops_at_its_limit(receiver_kit: Kits) -> None:
    @on("*", name="kit/circle")
    def circle(event: Event, ctx: Context) -> None:
        ctx.submit("eachlabs", "m", {"prompt": f"{event.prediction.depth}"})

    kit = receiver_kit(circle, settings={"RECEIVER_MAX_CHAIN": "2"})
    delivered = kit.deliver(make_event(provider="eachlabs", model="m"))
    for depth in (1, 2):
        [child] = delivered.children
        assert child.depth == depth
        delivered = kit.finish(child, make_event(provider="eachlabs", model="m"))
    assert (delivered.delivery.state, delivered.children) == ("dead", [])
    assert "2 predictions have led to this one" in delivered.delivery.reason


def test_http_and_files_are_unavailable_unless_the_test_provides_them(
    receiver_kit: Kits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.deliveries.fetch._PAUSES", ())  # after a 404

    @on("*", name="kit/edge")
    async def edge(_: Event, ctx: Context) -> None:
        answer = await ctx.http.get("https://chat.example/")
        file = await ctx.fetch("https://cdn.example/a")
        ctx.note(f"{answer.text} {file.read().decode()}")

    closed = receiver_kit(edge).deliver(make_event())
    assert "this test gave no answer" in closed.delivery.reason
    no_files = receiver_kit(edge, http=lambda _: httpx.Response(200)).deliver(make_event())
    assert no_files.delivery.reason == "the result is gone: HTTP 404"
    kit = receiver_kit(
        edge,
        http=lambda request: httpx.Response(200, text=request.url.host),
        files={"https://cdn.example/a": b"words"},
    )
    [attempt] = kit.deliver(make_event()).delivery.history
    assert attempt["note"] == "chat.example words"


def test_kit_that_cannot_start_reports_the_reason_and_leaves_no_folder_or_thread(
    receiver_kit: Kits, handler: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = set(threading.enumerate())
    with pytest.raises(HandlerError, match="no such file"):
        receiver_kit("nowhere.py")
    with pytest.raises(HandlerError, match="decorate it"):
        receiver_kit(print)
    with pytest.raises(SettingsError, match="RECEIVER_MAX_CHAIN"):
        receiver_kit(handler, settings={"RECEIVER_MAX_CHAIN": "many"})
    assert list(tmp_path.iterdir()) == []
    assert set(threading.enumerate()) <= threads


def test_files_that_import_each_others_handlers_load_together(
    receiver_kit: Kits, tmp_path: Path
) -> None:
    (tmp_path / "one.py").write_text("from receiver import on\n@on('*')\ndef f(event): ...\n")
    (tmp_path / "both.py").write_text("from one import f\n")
    kit = receiver_kit(*(str(tmp_path / name) for name in ("one.py", "both.py")))
    assert kit.deliver(make_event()).delivery.state == "done"


def test_kits_are_isolated_from_each_other(receiver_kit: Kits, handler: Any) -> None:
    one, other = receiver_kit(handler), receiver_kit(handler)
    assert one.deliver(make_event()).delivery.state == "done"
    assert other.get("/v1/predictions", dict[str, Any])["data"] == []


def test_route_rejects_calls_without_proof_and_delivers_its_prediction(
    receiver_kit: Kits,
) -> None:
    seen: list[Any] = []

    def prove(call: Call) -> None:
        if call.header("x-key") != "right":
            raise Unproved("bad_key")

    @route("shop", proof=prove)
    async def shop(call: Call, door: Door) -> Reply:
        made = await door.submit("fal", "fal-ai/a", call.json(), private={"to": "me"})
        return Reply.json({"id": made.id})

    @on("succeeded", name="answers")
    async def answers(_: Event, ctx: Context) -> None:
        seen.append(ctx.private)

    kit = receiver_kit(shop, answers)
    assert kit.calls("/in/shop", "{}").status_code == 401
    answer = kit.calls("/in/shop", b'{"prompt": "a"}', {"x-key": "right"})
    made = kit.get(f"/v1/predictions/{answer.json()['id']}", Prediction)
    assert kit.finish(made, make_event("succeeded")).delivery.state == "done"
    assert seen == [{"to": "me"}]
