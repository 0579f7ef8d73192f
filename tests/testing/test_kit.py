"""The kit is a real receiver: what it says of a handler is what would have happened."""

from __future__ import annotations

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
from receiver.model.errors import HandlerError
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
    """What a handler saw and did, over all its lives."""

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
def test_the_handler_sees_the_event_that_is_delivered(
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
def test_a_failure_comes_with_its_code(
    receiver_kit: Kits, handler: Any, provider: str, code: ErrorCode
) -> None:
    given = make_event("failed", provider=provider, model="m/n", error=(code, "it went wrong"))
    prediction = receiver_kit(handler).deliver(given).prediction
    assert prediction.error
    assert prediction.error.code == code


def test_what_a_provider_says_of_a_file_is_kept(receiver_kit: Kits, handler: Any) -> None:
    outputs = [Output(url="https://cdn.example/a.png", width=7), Output(url="https://x.example/b")]
    assert receiver_kit(handler).deliver(make_event(output=outputs)).prediction.output == outputs


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_lost_callback_is_found_by_asking(
    receiver_kit: Kits, handler: Any, provider: str
) -> None:
    event = make_event(provider=provider, model=PROVIDERS[provider])
    delivered = receiver_kit(handler).lose_callback(event)
    assert (delivered.prediction.channel, delivered.delivery.state) == ("poll", "done")


def test_a_crash_after_the_answer_loses_nothing(
    receiver_kit: Kits, handler: Any, witness: Witness
) -> None:
    delivered = receiver_kit(handler).crash_after_ack(make_event())
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("done", 1)
    assert len(witness.posts) == 1


def test_a_crash_after_a_run_runs_it_again_but_no_step_of_it(
    receiver_kit: Kits, handler: Any, witness: Witness
) -> None:
    delivered = receiver_kit(handler).crash_after_run(make_event())
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("done", 2)
    assert (len(witness.events), len(witness.posts)) == (2, 1)


def test_a_plain_function_can_crash_too(receiver_kit: Kits) -> None:
    runs = []

    @on("*", name="kit/plain")
    def plain(event: Event) -> None:
        runs.append(event.id)

    assert receiver_kit(plain).crash_after_run(make_event()).delivery.attempts == 2
    assert len(runs) == 2


def test_there_is_no_crash_after_what_never_returned(receiver_kit: Kits) -> None:
    @on("*", name="kit/raises")
    def raises(_: Event) -> None:
        raise Dead("no")

    with pytest.raises(AssertionError, match="no handler returned"):
        receiver_kit(raises).crash_after_run(make_event())


def test_the_clock_brings_the_next_attempt(receiver_kit: Kits) -> None:
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


def test_time_runs_out_for_what_never_works(receiver_kit: Kits) -> None:
    @on("*", name="kit/broken", retry=Retry(attempts=4))
    def broken(_: Event) -> None:
        raise ValueError("again")

    kit = receiver_kit(broken)
    delivered = kit.deliver(make_event())
    kit.exhaust(delivered)
    assert (delivered.delivery.state, len(delivered.delivery.history)) == ("dead", 4)


def test_a_replay_is_a_new_round(receiver_kit: Kits, handler: Any, witness: Witness) -> None:
    kit = receiver_kit(handler)
    kit.replay(kit.deliver(make_event()))
    first, second = witness.posts
    assert second == f"{first}.1"


def test_notes_annotations_and_chains_are_there_to_be_looked_at(receiver_kit: Kits) -> None:
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


def test_a_circle_of_handlers_comes_to_an_end(receiver_kit: Kits) -> None:
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


def test_the_edge_is_closed_unless_it_is_opened(receiver_kit: Kits) -> None:
    @on("*", name="kit/edge")
    async def edge(_: Event, ctx: Context) -> None:
        answer = await ctx.http.get("https://chat.example/")
        file = await ctx.fetch("https://cdn.example/a")
        ctx.note(f"{answer.text} {file.read().decode()}")

    closed = receiver_kit(edge).deliver(make_event())
    assert "this test gave no answer" in closed.delivery.reason
    kit = receiver_kit(
        edge,
        http=lambda request: httpx.Response(200, text=request.url.host),
        files={"https://cdn.example/a": b"words"},
    )
    [attempt] = kit.deliver(make_event()).delivery.history
    assert attempt["note"] == "chat.example words"


def test_a_kit_that_cannot_start_says_why_and_leaves_nothing(receiver_kit: Kits) -> None:
    with pytest.raises(HandlerError, match="no such file"):
        receiver_kit("nowhere.py")
    with pytest.raises(HandlerError, match="decorate it"):
        receiver_kit(print)


def test_files_that_import_each_others_handlers_are_loaded_as_one(
    receiver_kit: Kits, tmp_path: Path
) -> None:
    (tmp_path / "one.py").write_text("from receiver import on\n@on('*')\ndef f(event): ...\n")
    (tmp_path / "both.py").write_text("from one import f\n")
    kit = receiver_kit(*(str(tmp_path / name) for name in ("one.py", "both.py")))
    assert kit.deliver(make_event()).delivery.state == "done"


def test_several_kits_do_not_know_each_other(receiver_kit: Kits, handler: Any) -> None:
    one, other = receiver_kit(handler), receiver_kit(handler)
    assert one.deliver(make_event()).delivery.state == "done"
    assert other.get("/v1/predictions", dict[str, Any])["data"] == []


def test_a_route_is_called_as_a_stranger_calls_it_and_its_prediction_delivered(
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
