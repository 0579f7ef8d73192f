"""Workers run pending deliveries; each handler's worker is isolated from all others."""

import asyncio
import os
import secrets
import threading
import time
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from receiver import Context, Dead, Event, Retry, Skip, on
from receiver.deliveries.heartbeat import Timing
from receiver.deliveries.worker import Worker
from receiver.model.errors import StoreUnavailable
from receiver.model.ids import delivery_id
from receiver.observability.runtime import new_owner
from receiver.store.deliveries import ClaimRequest, Claims, Settlement
from tests.clocks import LoopClock
from tests.conftest import Disk, Start
from tests.deliveries.parts import POLICY, FailingStore, dispatching, eventually
from tests.forked import run_to_end
from tests.patience import PATIENCE
from tests.postgres import Database
from tests.receiving import Network

pytestmark = pytest.mark.anyio

Place = Path | Database
Logged = Sequence[MutableMapping[str, Any]]


def named(logged: Logged, event: str) -> list[MutableMapping[str, Any]]:
    return [line for line in logged if line["event"] == event]


async def test_pending_event_is_delivered_to_async_and_plain_handlers(place: Place) -> None:
    seen: list[tuple[str, str]] = []

    async def on_the_loop(event: Event, ctx: Context) -> None:
        seen.append((event.prediction.id, ctx.idempotency_key))

    def in_a_thread(event: Event) -> None:
        assert threading.current_thread() is not threading.main_thread()
        seen.append((event.prediction.id, event.type))

    def makes_a_coroutine(event: Event) -> Any:
        async def later() -> None:
            seen.append((event.prediction.id, "later"))

        return later()

    functions = [on(name=f.__name__)(f) for f in (on_the_loop, in_a_thread, makes_a_coroutine)]
    async with dispatching(place, *functions) as running:
        prediction = await running.enqueue()
        for function in functions:
            delivery = await running.ends(prediction, function.__name__)
            assert (delivery.state, delivery.attempts, delivery.reason) == ("done", 1, "")
            assert [attempt["result"] for attempt in delivery.history] == ["done"]
    assert {prediction_id for prediction_id, _ in seen} == {prediction}
    assert {what for _, what in seen} == {
        delivery_id(prediction, "on_the_loop"),
        "prediction.succeeded",
        "later",
    }


LONG_KEY = secrets.token_hex(4000)
"""Too long for an index entry of PostgreSQL."""


class Quota(Exception):
    after = "2026-12-01"
    """Not the `after` of a Retry, so it must be ignored."""


class Tomorrow(Retry):
    after = "tomorrow"  # type: ignore[assignment]

    def __init__(self) -> None:
        Exception.__init__(self, "not a number")


class Raising(Exception):
    @property
    def after(self) -> float:
        raise ZeroDivisionError


class Unsayable(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


class Leaving(Exception):
    """Raises SystemExit when its message is read."""

    def __str__(self) -> str:
        raise SystemExit(4)


class Strange(BaseException):
    pass


def raising(error: BaseException) -> Callable[..., None]:
    def fails(_: Event) -> None:
        raise error

    return fails


def raising_async(error: BaseException) -> Callable[..., Any]:
    async def fails(_: Event) -> None:
        raise error

    return fails


def raising_later(error: BaseException) -> Callable[..., Any]:
    async def later() -> None:
        raise error

    def fails(_: Event) -> Any:
        return later()

    return fails


def raising_in_once(error: BaseException) -> Callable[..., Any]:
    async def step() -> None:
        raise error

    def fails(_: Event, ctx: Context) -> None:
        ctx.once("step", step)

    return fails


OTHER_ENDS: list[tuple[BaseException, str, str, str]] = [
    (ValueError("no luck"), "dead", "error", "ValueError: no luck"),
    (ValueError(), "dead", "error", "ValueError: ValueError"),
    (ValueError("half a character: \udce9"), "dead", "error", "half a character: \\udce9"),
    (ValueError("x" * 9000), "dead", "error", "x" * 500),
    (Unsayable(), "dead", "error", "Unsayable: Unsayable"),
    (Leaving(), "dead", "error", "Leaving: Leaving"),
    (Skip("not mine"), "skipped", "skip", "not mine"),
    (Skip(), "skipped", "skip", "Skip"),
    (Dead("never"), "dead", "dead", "never"),
    (Retry(after=0), "dead", "retry", "the handler asked"),
    (SystemExit(3), "dead", "error", "SystemExit: 3"),
    (KeyboardInterrupt(), "dead", "error", "KeyboardInterrupt"),
    (StopIteration(1), "dead", "error", "StopIteration"),
    (GeneratorExit(), "dead", "error", "GeneratorExit"),
    (asyncio.CancelledError(), "dead", "error", "ancel"),
    (Strange("odd"), "dead", "error", "odd"),
    (Quota("spent"), "dead", "error", "Quota: spent"),
    (Raising("odd"), "dead", "error", "Raising: odd"),
    (Tomorrow(), "dead", "retry", "not a number"),
]


def grouped(*errors: BaseException) -> BaseExceptionGroup[BaseException]:
    return BaseExceptionGroup("several", [*errors])


TOGETHER: list[tuple[BaseException, str, str, str]] = [
    (grouped(Skip("not mine")), "skipped", "skip", "not mine"),
    (grouped(Skip("a"), ValueError("b")), "dead", "error", "several"),
    (grouped(ValueError("b"), Retry("later", after=0)), "dead", "retry", "later"),
    (grouped(Retry("later", after=0), grouped(Dead("never"))), "dead", "dead", "never"),
    (grouped(SystemExit(2), ValueError()), "dead", "error", "several"),
    (grouped(Tomorrow(), Retry("later", after=0)), "dead", "retry", ""),
]
OTHER_ENDS += TOGETHER


@pytest.mark.usefixtures("on_sqlite")  # the error itself never reaches the store
@pytest.mark.parametrize("make", [raising, raising_async, raising_later, raising_in_once])
async def test_any_exception_of_a_handler_ends_only_its_own_attempt(
    place: Place, make: Callable[[BaseException], Callable[..., Any]]
) -> None:
    done = threading.Event()

    def neighbour(_: Event) -> None:
        done.set()

    fail = [
        on(name=f"fails-{number}", retry=Retry(attempts=2))(make(error))
        for number, (error, *_) in enumerate(OTHER_ENDS)
    ]
    async with dispatching(place, *fail, on(name="neighbour")(neighbour)) as running:
        prediction = await running.enqueue()
        ended = [
            await running.ends(prediction, f"fails-{number}") for number in range(len(OTHER_ENDS))
        ]
        assert (await running.ends(prediction, "neighbour")).state == "done"
    for delivery, (error, state, result, reason) in zip(ended, OTHER_ENDS, strict=True):
        assert delivery.state == state, error
        assert reason in delivery.reason, error
        attempts = 1 if result in {"skip", "dead"} else 2
        assert [attempt["result"] for attempt in delivery.history] == [result] * attempts, error
    assert done.is_set()


async def test_skipped_delivery_is_logged_as_info(place: Place, logged: Logged) -> None:
    def picky(_: Event) -> None:
        raise Skip("not mine")

    async with dispatching(place, on(name="picky")(picky)) as running:
        await running.ends(await running.enqueue(), "picky")
        await eventually(lambda: named(logged, "handler.attempt"))
    [line] = named(logged, "handler.attempt")
    assert (line["log_level"], line["result"], line["reason"]) == ("info", "skip", "not mine")


async def test_failing_handler_is_retried_until_it_succeeds(place: Place, logged: Logged) -> None:
    attempts: list[int] = []

    async def flaky(_: Event, ctx: Context) -> None:
        attempts.append(ctx.attempt)
        if ctx.attempt < 3:
            raise RuntimeError("not yet")

    async with dispatching(place, on(name="flaky")(flaky)) as running:
        delivery = await running.ends(await running.enqueue(), "flaky")
    assert attempts == [1, 2, 3]
    assert [attempt["result"] for attempt in delivery.history] == ["error", "error", "done"]
    assert [attempt["number"] for attempt in delivery.history] == [1, 2, 3]
    lines = named(logged, "handler.attempt")
    assert [(line["attempt"], line["state"], line["log_level"]) for line in lines] == [
        (1, "pending", "warning"),
        (2, "pending", "warning"),
        (3, "done", "info"),
    ]
    assert isinstance(lines[0]["exc_info"], RuntimeError)


async def test_handler_without_retry_uses_the_default_policy(place: Place) -> None:
    def hopeless(_: Event) -> None:
        raise RuntimeError("never")

    async with dispatching(place, on(name="hopeless")(hopeless)) as running:
        delivery = await running.ends(await running.enqueue(), "hopeless")
    assert (delivery.state, len(delivery.history)) == ("dead", POLICY.attempts)


@pytest.mark.usefixtures("on_sqlite")  # PgQueuer uses the server's clock
async def test_retry_after_delays_the_next_attempt(place: Place) -> None:
    calls: list[int] = []

    def patient(_: Event, ctx: Context) -> None:
        calls.append(ctx.attempt)
        if ctx.attempt == 1:
            raise Retry("rate limited", after=3600)

    async with dispatching(place, on(name="patient")(patient)) as running:
        running.clock.stand()
        prediction = await running.enqueue()
        await eventually(lambda: calls == [1])
        delivery = await running.ends(prediction, "patient", "pending")
        assert delivery.reason == "rate limited"
        assert delivery.due_at is not None
        due_at = datetime.fromisoformat(delivery.due_at).timestamp()
        assert due_at == pytest.approx(running.clock() + 3600, abs=0.001)
        running.clock.ahead = 3601
        assert (await running.ends(prediction, "patient")).state == "done"
    assert calls == [1, 2]


async def test_concurrency_limits_the_running_attempts_of_a_handler(place: Place) -> None:
    now: set[str] = set()
    most: list[int] = []
    enough = asyncio.Event()

    async def narrow(event: Event) -> None:
        now.add(event.id)
        most.append(len(now))
        if len(now) == 3:
            enough.set()
        await enough.wait()
        await asyncio.sleep(0)
        now.discard(event.id)

    async with dispatching(place, on(name="narrow", concurrency=3)(narrow)) as running:
        predictions = [await running.enqueue() for _ in range(12)]
        for prediction in predictions:
            await running.ends(prediction, "narrow")
    assert max(most) == 3
    assert len(most) == 12


class Late(FailingStore):
    """A store that settles no delivery until `may_settle` is set."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.may_settle = asyncio.Event()

    async def settle(self, settlement: Settlement) -> bool:
        await self.may_settle.wait()
        held: bool = await self._store.settle(settlement)
        return held


async def test_next_attempt_starts_before_the_last_is_settled_up_to_a_limit(
    place: Place,
) -> None:
    seen: list[str] = []

    async def quick(event: Event) -> None:
        seen.append(event.prediction.id)

    async with dispatching(place, on(name="quick", concurrency=1)(quick), start=False) as running:
        predictions = [await running.enqueue() for _ in range(3)]
        store = Late(running.store)
        worker = running.another("me", store=store)
        await worker.start()
        await eventually(lambda: len(seen) == 2)
        states = [(await running.delivery(prediction, "quick")).state for prediction in predictions]
        assert sorted(states) == ["pending", "running", "running"]
        store.may_settle.set()
        for prediction in predictions:
            assert (await running.ends(prediction, "quick")).state == "done"
        await worker.stop()
    assert sorted(seen) == predictions


async def test_hanging_or_failing_handler_does_not_delay_other_handlers(place: Place) -> None:
    may_end = threading.Event()
    forever = asyncio.Event()

    def blocks(_: Event) -> None:
        may_end.wait(PATIENCE)

    async def hangs(_: Event) -> None:
        await forever.wait()

    def fails(_: Event) -> None:
        raise RuntimeError

    seen: list[str] = []

    async def quick(event: Event) -> None:
        seen.append(event.id)

    functions = [
        on(name="blocks", concurrency=1)(blocks),
        on(name="hangs", concurrency=1)(hangs),
        on(name="fails", retry=Retry(attempts=5))(fails),
        on(name="quick", concurrency=1)(quick),
    ]
    async with dispatching(place, *functions) as running:
        predictions = [await running.enqueue() for _ in range(20)]
        for prediction in predictions:
            assert (await running.ends(prediction, "quick")).state == "done"
        states = {(await running.delivery(predictions[-1], name)).state for name in ("blocks",)}
        assert states == {"pending"}
        may_end.set()
        forever.set()
        for prediction in predictions:
            assert (await running.ends(prediction, "blocks")).state == "done"
            assert (await running.ends(prediction, "hangs")).state == "done"
    assert len(seen) == 20


async def test_attempt_over_its_timeout_is_cancelled_and_retried(place: Place) -> None:
    canceled: list[int] = []

    async def slow(_: Event, ctx: Context) -> None:
        if ctx.attempt == 2:
            return
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            canceled.append(ctx.attempt)
            raise

    async with dispatching(place, on(name="slow", timeout=0.02)(slow)) as running:
        delivery = await running.ends(await running.enqueue(), "slow")
    assert canceled == [1]
    assert [a["result"] for a in delivery.history] == ["timeout", "done"]
    assert delivery.history[0]["reason"] == "longer than 0.02 s"


ENOUGH = Retry(attempts=1000, base=0, cap=0)


@pytest.mark.parametrize("plain", [True, False])
async def test_handler_that_ignores_its_timeout_blocks_only_its_own_slot(
    place: Place, logged: Logged, *, plain: bool
) -> None:
    may_end = threading.Event()
    calls: list[str] = []

    def stubborn(event: Event) -> None:
        calls.append(event.id)
        if len(calls) == 1:
            may_end.wait(PATIENCE)

    async def deaf(event: Event) -> None:
        calls.append(event.id)
        while len(calls) == 1 and not may_end.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    def quick(_: Event) -> None:
        return

    # On a slow machine any attempt may take too long, so there are enough of them.
    function = on(name="stuck", timeout=0.02, concurrency=1, retry=ENOUGH)(
        stubborn if plain else deaf
    )
    async with dispatching(place, function, on(name="quick")(quick)) as running:
        first = await running.enqueue()
        await eventually(lambda: calls and named(logged, "handler.stuck"))
        delivery = await running.delivery(first, "stuck")
        assert delivery.state == "pending"
        assert [attempt["result"] for attempt in delivery.history] == ["timeout"]

        second = await running.enqueue()
        assert (await running.ends(second, "quick")).state == "done"
        assert (await running.delivery(second, "stuck")).attempts == 0
        assert len(calls) == 1

        may_end.set()
        for prediction in (first, second):
            assert (await running.ends(prediction, "stuck")).state == "done"


@pytest.mark.parametrize("plain", [True, False])
async def test_step_runs_once_over_all_retries_and_again_after_a_replay(
    place: Place, *, plain: bool
) -> None:
    posts: list[str] = []
    seen: list[tuple[int, Any, str]] = []

    def post() -> dict[str, Any]:
        posts.append("posted")
        return {"message": len(posts), "text": "\u0000é"}

    async def post_later() -> dict[str, Any]:
        return post()

    def at_once(_: Event, ctx: Context) -> None:
        seen.append((ctx.attempt, ctx.once("post", post), ctx.idempotency_key))
        if ctx.attempt < 3:
            raise RuntimeError

    async def later(_: Event, ctx: Context) -> None:
        seen.append((ctx.attempt, await ctx.once("post", post_later), ctx.idempotency_key))
        if ctx.attempt < 3:
            raise RuntimeError

    async with dispatching(place, on(name="posts")(at_once if plain else later)) as running:
        prediction = await running.enqueue()
        await running.ends(prediction, "posts")
        assert [attempt for attempt, _, _ in seen] == [1, 2, 3]
        assert [result for _, result, _ in seen] == [{"message": 1, "text": "\u0000é"}] * 3
        [key] = {key for _, _, key in seen}

        await running.replay(prediction)
        await eventually(lambda: len(seen) == 6)
        assert {result["message"] for _, result, _ in seen[3:]} == {2}
        assert {name for _, _, name in seen[3:]} == {f"{key}.1"}
        await running.ends(prediction, "posts")
    assert posts == ["posted", "posted"]


async def test_overlapping_attempts_get_the_same_step_result(place: Place) -> None:
    may_end = threading.Event()
    seen: dict[int, int] = {}

    @on(name="slow", timeout=0.1)
    def slow(_: Event, ctx: Context) -> None:
        def step() -> int:
            if ctx.attempt == 1:
                may_end.wait(PATIENCE)
            return ctx.attempt

        seen[ctx.attempt] = ctx.once("step", step)

    async with dispatching(place, slow) as running:
        await running.enqueue()
        await eventually(lambda: seen)  # a later attempt has the result of its own step
        may_end.set()
        await eventually(lambda: 1 in seen and len(seen) > 1)
    [result] = set(seen.values())
    assert result > 1


@pytest.mark.parametrize("key", ["step", LONG_KEY], ids=["short", "long"])
async def test_failed_step_is_not_stored_and_runs_again(place: Place, key: str) -> None:
    tries: list[int] = []

    def step() -> int:
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError
        return len(tries)

    async def careful(_: Event, ctx: Context) -> None:
        await ctx.once(key, step)
        await ctx.once("nothing", lambda: None)
        if ctx.attempt == 2:
            raise RuntimeError

    async with dispatching(place, on(name="careful")(careful)) as running:
        assert (await running.ends(await running.enqueue(), "careful")).attempts == 3
    assert len(tries) == 2


def circle() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    "result", [object(), "\ud800", circle()], ids=["no JSON", "half", "circle"]
)
async def test_step_with_an_unstorable_result_does_not_run_again(
    place: Place, logged: Logged, result: Any
) -> None:
    posts: list[Any] = []

    def step() -> Any:
        posts.append(result)
        return result

    def careless(_: Event, ctx: Context) -> None:
        assert ctx.once("post", step) is None
        if ctx.attempt == 1:
            raise RuntimeError

    async with dispatching(place, on(name="careless")(careless)) as running:
        assert (await running.ends(await running.enqueue(), "careless")).attempts == 2
    assert len(posts) == 1
    assert [line["step"] for line in named(logged, "step.unkept")] == ["post"]


async def test_submit_in_a_handler_is_sent_once_over_all_retries(place: Place) -> None:
    made: list[str] = []

    async def chain(_: Event, ctx: Context) -> None:
        first = await ctx.submit("fal", "fal-ai/upscale", {"n": 1})
        second = await ctx.submit("fal", "fal-ai/upscale", {"n": 2}, metadata={"own": 1})
        made.extend((first.id, second.id))
        if ctx.attempt < 3:
            raise RuntimeError

    def chain_in_thread(_: Event, ctx: Context) -> None:
        made.append(ctx.submit("fal", "fal-ai/upscale", {}).id)

    async with dispatching(
        place, on(name="chain")(chain), on(name="chain_in_thread")(chain_in_thread)
    ) as running:
        prediction = await running.enqueue("chain", metadata={"kind": "avatar"})
        await running.ends(prediction, "chain")
        assert made == ["pred_next_0", "pred_next_1"] * 3
        assert len(running.submits.made) == 2
        assert [asked.metadata for asked in running.submits.asked[:2]] == [
            {"kind": "avatar"},
            {"own": 1},
        ]
        assert {asked.parent_id for asked in running.submits.asked} == {prediction}

        await running.replay(prediction)
        # Three more attempts of `chain`, and one of the other handler, follow.
        await eventually(lambda: len(made) == 13)
        assert len(running.submits.made) == 5


@pytest.mark.usefixtures("on_sqlite")
@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
async def test_submits_inside_a_step_have_their_own_numbering(place: Place, *, plain: bool) -> None:
    """A retry that skips the step gives a later submit no key of a submit in the step."""
    made: list[tuple[int, Any]] = []

    async def chain(_: Event, ctx: Context) -> None:
        def submit(n: int) -> Any:
            return ctx.submit("fal", "fal-ai/upscale", {"n": n})

        async def twice() -> str:
            return f"{(await submit(1)).id} {(await submit(2)).id}"

        steps = ctx.once("twice", twice), ctx.once("once", lambda: submit(3))
        await asyncio.gather(*steps)
        made.append((ctx.attempt, (await submit(4)).input))
        if ctx.attempt < 3:
            raise RuntimeError

    def chain_in_thread(_: Event, ctx: Context) -> None:
        def submit(n: int) -> str:
            return ctx.submit("fal", "fal-ai/upscale", {"n": n}).id

        ctx.once("twice", lambda: submit(1) + submit(2))
        ctx.once("once", lambda: submit(3))
        made.append((ctx.attempt, ctx.submit("fal", "fal-ai/upscale", {"n": 4}).input))
        if ctx.attempt < 3:
            raise RuntimeError

    handler = on(name="chain")(chain_in_thread if plain else chain)
    async with dispatching(place, handler) as running:
        key = delivery_id(prediction := await running.enqueue(), "chain")
        await running.ends(prediction, "chain")
    assert made == [(attempt, {"n": 4}) for attempt in (1, 2, 3)]
    assert {name: one.input["n"] for name, one in running.submits.made.items()} == {
        f"{key}/once:twice/1": 1,
        f"{key}/once:twice/2": 2,
        f"{key}/once:once/1": 3,
        f"{key}/1": 4,
    }


async def test_plain_handler_can_use_asyncio_run(place: Place) -> None:
    """Calls of `ctx` run on the receiver's event loop, which outlives the handler's own."""
    loops: list[object] = []

    async def step() -> int:
        loops.append(asyncio.get_running_loop())
        return 5

    async def inside(ctx: Context) -> None:
        noting = asyncio.create_task(ctx.annotate(seen=True))
        assert await ctx.once("step", step) == 5
        await noting
        await ctx.submit("fal", "fal-ai/upscale", {})

    def own(_: Event, ctx: Context) -> None:
        asyncio.run(inside(ctx))

    handler = on(name="own", timeout=PATIENCE / 2, retry=Retry(attempts=1))(own)
    async with dispatching(place, handler) as running:
        prediction = await running.enqueue()
        assert (await running.ends(prediction, "own")).reason == ""
        found = await running.store.predictions.get(prediction)
        assert found is not None
        assert found.metadata == {"seen": True}
        assert len(running.submits.made) == 1
    assert loops == [asyncio.get_running_loop()]


async def test_deliveries_pending_before_the_start_are_run(place: Place) -> None:
    seen: list[str] = []

    def catch_up(event: Event) -> None:
        seen.append(event.id)

    async with dispatching(place, on(name="catch_up")(catch_up), start=False) as running:
        predictions = [await running.enqueue() for _ in range(3)]
        await running.dispatch.start()
        for prediction in predictions:
            await running.ends(prediction, "catch_up")
        await running.dispatch.stop()
    assert len(seen) == 3


async def test_worker_polls_for_pending_deliveries_without_a_wakeup(place: Place) -> None:
    def alone(_: Event) -> None:
        return

    async with dispatching(place, on(name="alone")(alone)) as running:
        running.dispatch, ours = running.another("nobody"), running.dispatch
        prediction = await running.enqueue()  # wakes only the worker that does not run
        assert (await running.ends(prediction, "alone")).state == "done"
        running.dispatch = ours


async def test_delivery_of_a_missing_handler_stays_pending_and_is_reported(
    place: Place, logged: Logged
) -> None:
    def known(_: Event) -> None:
        return

    async with dispatching(place, on(name="known")(known), start=False) as running:
        prediction = await running.enqueue("known", "gone")
        await running.dispatch.start()
        running.wakeups.wake("handler", "gone")
        await running.ends(prediction, "known")
        await running.dispatch.stop()
        assert (await running.delivery(prediction, "gone")).state == "pending"
    assert [(line["handler"], line["pending"]) for line in named(logged, "handler.missing")] == [
        ("gone", 1)
    ]


async def test_stop_waits_for_running_handlers_and_claims_no_more(place: Place) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def finishing(_: Event) -> None:
        begun.set()
        await may_end.wait()

    async with dispatching(place, on(name="finishing")(finishing), start=False) as running:
        await running.dispatch.start()
        prediction = await running.enqueue()
        async with asyncio.timeout(PATIENCE):
            await begun.wait()
        stopping = asyncio.create_task(running.dispatch.stop())
        later = await running.enqueue()
        may_end.set()
        await stopping
        assert (await running.delivery(prediction, "finishing")).state == "done"
        assert (await running.delivery(later, "finishing")).attempts == 0


@pytest.mark.parametrize("deaf", [False, True])
async def test_stop_releases_an_unfinished_delivery_and_its_attempt_does_not_count(
    place: Place, logged: Logged, *, deaf: bool
) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def endless(_: Event) -> None:
        begun.set()
        while not may_end.is_set():
            try:
                await may_end.wait()
            except asyncio.CancelledError:
                if not deaf:
                    raise

    pace = Timing(beat=0.05, nap=0.2, drain=0.05)
    async with dispatching(place, on(name="endless")(endless), pace=pace, start=False) as running:
        await running.dispatch.start()
        prediction = await running.enqueue()
        async with asyncio.timeout(PATIENCE):
            await begun.wait()
        await running.dispatch.stop()
        delivery = await running.delivery(prediction, "endless")
        assert (delivery.state, delivery.attempts, delivery.history) == ("pending", 0, [])
        [line] = named(logged, "handler.interrupted")
        assert (line["delivery"], line["prediction"]) == (delivery.id, prediction)
        may_end.set()

        again = running.another("next")
        await again.start()
        ended = await running.ends(prediction, "endless")
        await again.stop()
    assert (ended.state, ended.attempts) == ("done", 1)


async def test_attempt_that_stops_cut_short_too_often_counts_and_is_published(
    place: Place, logged: Logged
) -> None:
    begun = asyncio.Event()

    async def endless(_: Event) -> None:
        begun.set()
        await asyncio.Event().wait()

    pace = Timing(beat=0.05, nap=0.2, drain=0.05)
    async with dispatching(place, on(name="endless")(endless), pace=pace, start=False) as running:
        prediction = await running.enqueue()
        await running.store.attempts.follow()
        for number in range(4):
            assert running.store.attempts.take() == []
            worker = running.another(f"owner {number}")
            await worker.start()
            async with asyncio.timeout(PATIENCE):
                await begun.wait()
            begun.clear()
            await worker.stop()
        delivery = await running.delivery(prediction, "endless")
        assert [each.result for each in delivery.history] == ["lost"]
        assert len(named(logged, "handler.attempt")) == 1
        assert running.store.attempts.take() == [(delivery.id, 4)]


async def test_endless_handler_thread_does_not_block_the_stop(place: Place) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def endless(_: Event) -> None:
        begun.set()
        may_end.wait(PATIENCE)

    pace = Timing(beat=0.05, nap=0.2, drain=0.05)
    async with dispatching(place, on(name="endless")(endless), pace=pace) as running:
        await running.enqueue()
        await eventually(begun.is_set)
    may_end.set()


@pytest.mark.usefixtures("on_sqlite")  # PgQueuer waits for 30 s without heartbeat
async def test_delivery_of_a_killed_owner_is_run_by_another_after_its_lease(place: Place) -> None:
    seen: list[int] = []

    async def careful(_: Event, ctx: Context) -> None:
        seen.append(ctx.attempt)

    pace = Timing(lease=0.1, beat=0.05, nap=0.2)
    async with dispatching(place, on(name="careful")(careful), pace=pace, start=False) as running:
        running.clock.stand()
        prediction = await running.enqueue()
        now = running.clock()
        wish = ClaimRequest(handler="careful", owner="dead", most=1, now=now, lease_until=now + 0.2)
        assert len((await running.store.claim(wish)).claims) == 1
        running.clock.ahead += 1.0
        await running.dispatch.start()
        delivery = await running.ends(prediction, "careful")
        await running.dispatch.stop()
    assert seen == [2]
    assert (delivery.state, delivery.attempts) == ("done", 2)


@pytest.mark.usefixtures("on_sqlite")  # PgQueuer waits for 30 s without heartbeat
@pytest.mark.parametrize(("attempts", "losses"), [(1, 3), (3, 3), (5, 5)])
async def test_delivery_that_kills_its_process_repeatedly_becomes_dead(
    place: Place, attempts: int, losses: int
) -> None:
    calls: list[int] = []

    def deadly(_: Event, ctx: Context) -> None:
        calls.append(ctx.attempt)

    function = on(name="deadly", retry=Retry(attempts=attempts))(deadly)
    async with dispatching(place, function, start=False) as running:
        prediction = await running.enqueue()
        for life in range(losses):
            now = running.clock()
            wish = ClaimRequest(
                handler="deadly", owner=f"life {life}", most=1, now=now, lease_until=now + 9
            )
            [claim] = (await running.store.claim(wish)).claims
            assert claim.attempt == life + 1
            await running.store.recover("next life", running.clock())
        await running.dispatch.start()
        delivery = await running.ends(prediction, "deadly")
        await running.dispatch.stop()
    assert calls == []
    assert delivery.state == "dead"
    assert [attempt["number"] for attempt in delivery.history] == list(range(1, losses + 2))
    assert {attempt["result"] for attempt in delivery.history} == {"lost"}


@pytest.mark.parametrize("name", ["claim", "settle", "reclaim"])
async def test_store_call_is_retried_after_the_store_was_unavailable(
    place: Place, name: str
) -> None:
    calls: list[int] = []

    def steady(_: Event, ctx: Context) -> None:
        calls.append(ctx.attempt)

    pace = Timing(lease=0.1, beat=0.05, nap=0.1)
    async with dispatching(place, on(name="steady")(steady), pace=pace, start=False) as running:
        running.clock.stand()
        troubles: list[Exception] = [StoreUnavailable("full"), StoreUnavailable("full")]
        dispatch: Worker = running.another(
            "me too", store=FailingStore(running.store, **{name: troubles})
        )
        await dispatch.start()
        delivery = await running.ends(await running.enqueue(), "steady")
        await eventually(lambda: not troubles)
        await dispatch.stop()
    assert calls == [1]
    assert delivery.attempts == 1


async def test_unawaited_ctx_call_fails_the_attempt_but_an_unfinished_task_does_not(
    start: Start, network: Network, logged: Logged
) -> None:
    left: list[asyncio.Task[Any]] = []

    async def forgets(_: Event, ctx: Context) -> None:
        ctx.submit("fal", "fal-ai/next", {"prompt": "never"})
        ctx.annotate(seen=True)
        await ctx.once("step", lambda: None)

    async def leaves(_: Event, ctx: Context) -> None:
        left.append(asyncio.create_task(ctx.annotate(seen=True)))

    chosen = [
        on("succeeded", name=f.__name__, retry=Retry(attempts=1))(f) for f in (forgets, leaves)
    ]
    async with start(*chosen) as station:
        await station.push(await station.submitted("eachlabs"))
        await eventually(lambda: len(named(logged, "handler.attempt")) == 2)
        rows = station.rows("SELECT handler, state, reason FROM deliveries ORDER BY 1")
        said = "TypeError: the handler did not await ctx.annotate, ctx.submit"
        assert rows == [("forgets", "dead", said), ("leaves", "done", "")]
        await asyncio.gather(*left)
    assert network.count("fal.submit") == 0


@pytest.mark.parametrize(
    ("is_async", "too_long", "most_steps"), [(True, False, 1), (False, False, 1), (True, True, 2)]
)
async def test_handler_waits_while_the_disk_is_full_and_uses_up_no_attempt(
    start: Start,
    disk: Disk,
    logged: Logged,
    is_async: bool,
    too_long: bool,
    most_steps: int,
) -> None:
    loop_clock = LoopClock()
    taken: list[int] = []
    begun: list[Context] = []

    def step() -> None:
        disk.full = not taken
        taken.append(1)

    async def on_the_loop(_: Event, ctx: Context) -> None:
        begun.append(ctx)
        await ctx.once("step", step)
        await ctx.annotate(seen=ctx.attempt)
        await ctx.submit("fal", "fal-ai/next", {"prompt": "on the loop"})

    def in_a_thread(_: Event, ctx: Context) -> None:
        begun.append(ctx)
        ctx.once("step", step)
        ctx.annotate(seen=ctx.attempt)
        ctx.submit("fal", "fal-ai/next", {"prompt": "in a thread"})

    chosen = on("succeeded", name="patient", retry=Retry(attempts=1), timeout=PATIENCE)
    async with start(chosen(on_the_loop if is_async else in_a_thread)) as station:
        await station.push(await station.submitted("eachlabs"))
        await eventually(lambda: begun and begun[0].store_is_away)
        if too_long:
            loop_clock.ahead = PATIENCE
            await eventually(lambda: named(logged, "handler.interrupted"))
        disk.full = False
        await eventually(lambda: named(logged, "handler.attempt"))
        [(state, attempts)] = station.rows("SELECT state, attempts FROM deliveries")
        assert (state, attempts) == ("done", 1)
        # A write that was under way when the attempt was interrupted may still be committed.
        assert 1 <= len(taken) <= most_steps
        assert station.count("predictions") == 2


async def test_thread_stops_waiting_for_the_store_when_its_attempt_is_over(
    start: Start, disk: Disk
) -> None:
    let_go: list[int] = []

    def waits(_: Event, ctx: Context) -> None:
        disk.full = not let_go
        try:
            ctx.annotate(seen=True)
        except StoreUnavailable:
            let_go.append(ctx.attempt)

    async with start(on("succeeded", name="waits", timeout=0.2)(waits)) as station:
        await station.push(await station.submitted("eachlabs"))
        await eventually(lambda: let_go)
        disk.full = False
        await eventually(lambda: station.rows("SELECT state FROM deliveries") == [("done",)])
    assert let_go == [1]


@pytest.mark.usefixtures("on_sqlite")
async def test_thread_cannot_fetch_after_its_attempt_is_over(place: Place) -> None:
    is_over = threading.Event()
    fetched: list[object] = []

    def slow(_: Event, ctx: Context) -> None:
        is_over.wait(PATIENCE)
        try:
            fetched.append(ctx.fetch("data:image/png;base64,iVBORw0KGgo="))
        except RuntimeError as error:
            fetched.append(str(error))

    handler = on(name="slow", timeout=0.05, retry=Retry(attempts=1))(slow)
    async with dispatching(place, handler) as running:
        await running.ends(await running.enqueue(), "slow")
        is_over.set()
        await eventually(lambda: fetched)
    assert fetched == ["the attempt is over, and nothing would delete what is fetched now"]


class Renewing(FailingStore):
    """Counts renewals; claims for the handler `name` fail once the event is set."""

    renewals = 0
    failures = 0

    def __init__(self, store: Any, name: str, begun: asyncio.Event) -> None:
        super().__init__(store)
        self._name, self._begun = name, begun

    def renew(self, *given: Any) -> None:
        self.renewals += 1
        self._store.renew(*given)

    async def claim(self, wanted: ClaimRequest) -> Claims:
        if wanted.handler == self._name:
            if self._name == "other":
                await self._begun.wait()
            if self._begun.is_set():
                self.failures += 1
                raise StoreUnavailable("a hiccup")
        found: Claims = await self._store.claim(wanted)
        return found


@pytest.mark.usefixtures("on_sqlite")
@pytest.mark.parametrize(
    ("how", "fails"), [("drain", "other"), ("drain", "work"), ("request", "other")]
)
async def test_running_attempt_keeps_its_lease_while_other_claims_fail(
    place: Place, how: str, fails: str
) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()
    long: list[str] = []

    async def other(_: Event) -> None:
        return

    async def work(event: Event) -> None:
        if event.prediction.id in long:
            begun.set()
            await may_end.wait()

    handlers = on(name="other")(other), on(name="work")(work)
    async with dispatching(place, *handlers, start=False) as running:
        await running.enqueue("work")
        long.append(await running.enqueue("work"))
        store = Renewing(running.store, fails, begun)
        worker = running.another("me too", store=store)
        await worker.start(by_itself=False)
        names = ["other", "work"]
        if how == "request":
            under_way = worker.run_now(f"evt_{long[0][5:]}", names, PATIENCE)
        else:
            until = asyncio.get_running_loop().time() + PATIENCE
            under_way = worker.drain(names, until, PATIENCE)
        task = asyncio.create_task(under_way)
        await eventually(lambda: store.failures)
        renewals = store.renewals
        await eventually(lambda: store.renewals > renewals + 2)
        may_end.set()
        with pytest.raises(StoreUnavailable):
            await task
        delivery = await running.delivery(long[0], "work")
        assert (delivery.state, delivery.attempts) == ("done", 1)
        await worker.stop()


async def test_slot_freed_during_a_claim_is_used_at_once(place: Place) -> None:
    """Two deliveries end during the claim of the third, so the fourth must start at once."""
    begun = [asyncio.Event() for _ in range(4)]
    may_end = [asyncio.Event() for _ in range(4)]
    order = iter(range(4))

    async def steps(_: Event) -> None:
        number = next(order)
        begun[number].set()
        await may_end[number].wait()

    class Slow(FailingStore):
        async def claim(self, wanted: ClaimRequest) -> Claims:
            found: Claims = await self._store.claim(wanted)
            if begun[1].is_set() and not begun[2].is_set():
                may_end[1].set()
                await eventually(lambda: dispatch.attempts == 2)
                await asyncio.sleep(0)
            return found

    pace = Timing(beat=0.05, nap=3600)
    function = on(name="steps", concurrency=2)(steps)
    async with dispatching(place, function, pace=pace, start=False) as running:
        for _ in range(4):
            await running.enqueue()
        dispatch = running.another("me too", store=Slow(running.store))
        await dispatch.start()
        async with asyncio.timeout(PATIENCE):
            await begun[1].wait()
            may_end[0].set()
            await begun[3].wait()
        for event in may_end:
            event.set()
        await dispatch.stop()


async def test_worker_continues_after_an_unexpected_claim_error(
    place: Place, logged: Logged
) -> None:
    def steady(_: Event) -> None:
        return

    async with dispatching(place, on(name="steady")(steady), start=False) as running:
        store = FailingStore(running.store, claim=[ValueError("a row that makes no sense")])
        dispatch = running.another("me too", store=store)
        await dispatch.start()
        assert (await running.ends(await running.enqueue(), "steady")).state == "done"
        await dispatch.stop()
    assert [line["handler"] for line in named(logged, "task.failed")] == ["steady"]


async def test_unexpected_settle_error_is_reported_and_the_delivery_released(
    place: Place, logged: Logged
) -> None:
    def steady(_: Event) -> None:
        return

    async with dispatching(place, on(name="steady")(steady), start=False) as running:
        store = FailingStore(running.store, settle=[ValueError("odd")])
        dispatch = running.another("me too", store=store)
        await dispatch.start()
        prediction = await running.enqueue()
        await eventually(lambda: named(logged, "task.failed"))
        await dispatch.stop()  # releases the claim
        assert (await running.delivery(prediction, "steady")).state == "pending"


async def test_unavailable_store_does_not_block_the_stop(place: Place) -> None:
    async with dispatching(place, start=False) as running:
        store = FailingStore(running.store, release=[StoreUnavailable("full")])
        dispatch = running.another("me too", store=store)
        await dispatch.start()
        await dispatch.stop()


async def test_attempt_with_a_lost_claim_is_logged_and_not_settled(
    place: Place, logged: Logged
) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def slow(_: Event) -> None:
        begun.set()
        await may_end.wait()

    async with dispatching(place, on(name="slow")(slow)) as running:
        prediction = await running.enqueue()
        async with asyncio.timeout(PATIENCE):
            await begun.wait()
        await running.store.recover("somebody else", running.clock() + 3600)
        may_end.set()
        await eventually(lambda: named(logged, "handler.attempt"))
        delivery = await running.delivery(prediction, "slow")
        assert delivery.state == "pending"
        assert [attempt["result"] for attempt in delivery.history] == ["lost"]
    assert named(logged, "handler.attempt")[0]["state"] == "claim lost"


async def test_blocked_event_loop_is_logged_and_its_leases_are_renewed(
    place: Place, logged: Logged
) -> None:
    renewed = threading.Semaphore(0)
    beats: list[float] = []

    class Counting(FailingStore):
        def renew(self, owner: str, delivery_ids: list[str], lease_until: float) -> None:
            self._store.renew(owner, delivery_ids, lease_until)
            beats.append(lease_until)
            renewed.release()

    async def blocks_the_loop(_event: Event) -> None:
        while renewed.acquire(blocking=False):
            pass
        for _ in range(4):  # meanwhile nothing else can run on the loop
            assert renewed.acquire(timeout=PATIENCE)

    pace = Timing(lease=30, beat=0.02, nap=0.2)
    async with dispatching(
        place, on(name="blocks_the_loop")(blocks_the_loop), pace=pace, start=False
    ) as running:
        dispatch = running.another("me too", store=Counting(running.store))
        await dispatch.start()
        delivery = await running.ends(await running.enqueue(), "blocks_the_loop")
        await dispatch.stop()
    assert delivery.state == "done"
    assert len(beats) >= 4
    assert beats == sorted(beats)
    reported = [line["running"] for line in named(logged, "loop.blocked")]
    assert ["blocks_the_loop"] in reported


_STUCK = """
import asyncio, sys, threading
from pathlib import Path
from types import SimpleNamespace
from receiver import Event, on
from receiver.observability import logging as logs
from receiver.deliveries import containment
from tests.deliveries.parts import dispatching

pace = SimpleNamespace(lease=30.0, beat=0.05, stuck=60.0, nap=0.2, drain=2.0)

async def waits_for_ever(_: Event) -> None:
    pace.stuck = 0.2  # only now, as a slow machine may block the loop for so long
    threading.Lock().acquire()
    threading.Event().wait()

async def main() -> None:
    handler = on(name="waits", timeout=0.2)(waits_for_ever)
    async with dispatching(Path(sys.argv[1]), handler, pace=pace) as running:
        await running.enqueue()
        await asyncio.sleep(3600)

logs.configure("json", "info", sys.stdout)
containment.run(main(), asyncio.new_event_loop())
"""


_FORKED = """
import asyncio, os, sys
from pathlib import Path
from receiver import Event, on
from tests.deliveries.parts import dispatching

async def fine(_: Event) -> None:
    await asyncio.sleep(0)

async def main() -> None:
    async with dispatching(Path(sys.argv[1]), on(name="fine")(fine)) as running:
        await running.ends(await running.enqueue(), "fine", "done")
    print("done", flush=True)

if not os.fork():
    asyncio.run(main())
    os._exit(0)
os.wait()
"""


def test_worker_runs_in_a_forked_process(tmp_path: Path) -> None:
    ended = run_to_end(["-c", _FORKED, str(tmp_path / "receiver.db")], tmp_path, os.environ)
    assert ended.stdout.endswith("done\n"), ended.stderr


def test_stuck_event_loop_ends_the_process_and_the_attempt_is_lost(tmp_path: Path) -> None:
    database = tmp_path / "receiver.db"
    ended = run_to_end(["-c", _STUCK, str(database)], tmp_path, os.environ)
    assert ended.returncode == 1
    [line] = [line for line in ended.stdout.splitlines() if "loop.stuck" in line]
    assert "waits_for_ever" in line

    async def lost() -> list[Any]:
        async with dispatching(database, start=False) as running:
            await running.store.recover("next", running.clock())
            return (await running.store.deliveries.page(1)).data

    [delivery] = asyncio.run(lost())
    assert (delivery.state, delivery.attempts) == ("pending", 1)


async def test_stuck_event_loop_of_another_program_is_logged_once(
    place: Place, logged: Logged
) -> None:
    pace: Any = SimpleNamespace(lease=30.0, beat=0.02, stuck=PATIENCE, nap=0.2, drain=2.0)

    def beats_since() -> int:
        """Return how many times the loop was found blocked since it was found stuck."""
        events = [line["event"] for line in logged]
        return events[events.index("loop.stuck") :].count("loop.blocked")

    async def blocks(_event: Event) -> None:
        pace.stuck = 0.1  # only now, as a slow machine may block the loop for so long
        deadline = time.monotonic() + PATIENCE
        while not (named(logged, "loop.stuck") and beats_since() >= 3):
            assert time.monotonic() < deadline
            time.sleep(0.01)  # noqa: ASYNC251 - to block the loop
        pace.stuck = PATIENCE

    handler = on(name="blocks", timeout=0.1)(blocks)
    async with dispatching(place, handler, pace=pace) as running:
        assert (await running.ends(await running.enqueue(), "blocks")).state == "done"
    [line] = named(logged, "loop.stuck")
    assert line["running"] == ["blocks"]
    assert ", in blocks" in line["stack"]


def test_heartbeat_thread_ends_with_its_event_loop(place: Place) -> None:
    async def leave_without_stopping() -> Worker:
        async with dispatching(place, start=False) as running:
            await running.dispatch.start()
            return running.dispatch

    dispatch = asyncio.run(leave_without_stopping())
    heart = dispatch._heartbeat._thread  # noqa: SLF001 - nothing public shows the thread
    assert heart is not None
    heart.join(PATIENCE)
    assert not heart.is_alive()


def test_owner_names_are_unique() -> None:
    assert len({new_owner() for _ in range(100)}) == 100


async def test_worker_that_was_never_started_can_be_stopped(place: Place) -> None:
    async with dispatching(place, start=False) as running:
        await running.dispatch.stop()


def test_handler_thread_that_outlives_the_event_loop_can_finish(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    threads: list[threading.Thread] = []
    errors: list[object] = []
    monkeypatch.setattr(threading, "excepthook", errors.append)

    def late(_: Event) -> None:
        threads.append(threading.current_thread())
        may_end.wait(PATIENCE)

    async def main() -> None:
        pace = Timing(beat=0.05, nap=0.2, drain=0.01)
        async with dispatching(place, on(name="late")(late), pace=pace) as running:
            await running.enqueue()
            await eventually(lambda: threads)

    asyncio.run(main())
    [thread] = threads
    assert thread.is_alive()
    may_end.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert errors == []


async def test_after_delays_only_the_handler_that_names_it(place: Place) -> None:
    order: list[str] = []
    may_end = asyncio.Event()

    @on("*", name="save")
    async def save(_: Event) -> None:
        await may_end.wait()
        order.append("save")

    @on("*", name="post", after="save")
    async def post(_: Event) -> None:
        order.append("post")

    @on("*", name="log")
    async def log(_: Event) -> None:
        order.append("log")

    async with dispatching(place, post, save, log) as running:
        prediction = await running.enqueue()
        await running.ends(prediction, "log")
        assert order == ["log"]
        waiting = await running.delivery(prediction, "post")
        assert (waiting.state, waiting.reason) == ("pending", "waits for save")
        may_end.set()
        await running.ends(prediction, "post")
    assert order == ["log", "save", "post"]


def _list_of_work(_: Event) -> Any:
    return [asyncio.sleep(0)]


async def _work(_: Event) -> Any:
    return (number for number in range(3))


def _generator(_: Event) -> Any:
    return map(print, "abc")


def _no_call(_: Event) -> Any:
    return _list_of_work


async def _call_for_later(_: Event) -> Any:
    return {"later": partial(print, "abc")}


@pytest.mark.usefixtures("on_sqlite")
@pytest.mark.parametrize("handler", [_list_of_work, _work, _generator, _no_call, _call_for_later])
async def test_returned_coroutine_generator_or_function_fails_the_attempt(
    place: Place, handler: Any
) -> None:
    async with dispatching(place, on(name="h", retry=Retry(attempts=1))(handler)) as running:
        delivery = await running.ends(await running.enqueue(), "h")
    assert (delivery.state, "which nothing runs" in delivery.reason) == ("dead", True)


@pytest.mark.usefixtures("on_sqlite")
async def test_handler_cannot_change_the_http_client_of_another(place: Place) -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, headers={"set-cookie": "session=mine"})

    async def hooked(request: httpx.Request) -> None:
        request.headers["x-hooked"] = "mine"

    async def breaks(_: Event, ctx: Context) -> None:
        async with ctx.http as client:
            client.headers["authorization"] = "mine"
            client.base_url = "https://mine.example"
            client.event_hooks["request"] = [hooked]
            await client.get("/")
        await ctx.http.aclose()

    async def uses(_: Event, ctx: Context) -> None:
        await ctx.http.get("https://other.example/")

    handlers = on(name="breaks")(breaks), on(name="uses", after="breaks")(uses)
    async with dispatching(place, *handlers, start=False) as running:
        running.http._transport = httpx.MockTransport(answer)  # noqa: SLF001 - instead of a network
        await running.dispatch.start()
        prediction = await running.enqueue()
        assert (await running.ends(prediction, "uses")).state == "done"
        assert (await running.ends(prediction, "breaks")).state == "done"
        await running.dispatch.stop()
    mine, other = asked
    assert (mine.url.host, mine.headers["authorization"]) == ("mine.example", "mine")
    assert not {"authorization", "cookie", "x-hooked"} & set(other.headers)


@pytest.mark.usefixtures("on_sqlite")
async def test_metadata_added_by_a_handler_is_limited_in_size(place: Place) -> None:
    async def adds(_: Event, ctx: Context) -> None:
        await ctx.annotate(a="x" * 200_000)
        await ctx.annotate(a="y" * 200_000)
        await ctx.annotate(b="x" * 200_000)

    async with dispatching(place, on(name="adds", retry=Retry(attempts=1))(adds)) as running:
        delivery = await running.ends(await running.enqueue(), "adds")
    assert (delivery.state, "the metadata has 400,0" in delivery.reason) == ("dead", True)


async def test_metadata_added_by_several_handlers_is_limited_together(place: Place) -> None:
    async def one(_: Event, ctx: Context) -> None:
        await ctx.annotate(one="x" * 200_000)

    async def two(_: Event, ctx: Context) -> None:
        await ctx.annotate(two="x" * 200_000)

    handlers = [on(name=f.__name__, retry=Retry(attempts=1))(f) for f in (one, two)]
    async with dispatching(place, *handlers) as running:
        prediction = await running.enqueue()
        ended = [await running.ends(prediction, name) for name in ("one", "two")]
        found = await running.store.predictions.get(prediction)
    [(state, reason)] = [(one.state, one.reason) for one in ended if one.state != "done"]
    assert (state, "the metadata has 400,0" in reason) == ("dead", True)
    assert found is not None
    assert len(found.metadata) == 1
