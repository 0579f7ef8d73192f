"""Predictions in the store: create, submit, poll, cancel, recovery, rate limits and lists."""

import asyncio
from typing import Any

import msgspec
import pytest

from receiver.model.states import TERMINAL, TRANSITIONS, Cause
from receiver.model.values import Shift, Status
from receiver.store import predictions
from receiver.store.facade import Store
from receiver.store.inbox import accept_outcome
from receiver.store.leases import LeaseRequest
from receiver.store.limits import RequestPermit
from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.queue import PgQueuerJobs
from receiver.store.postgres.sessions import _OF_A_SESSION
from receiver.store.predictions import PredictionFilter, ProgressCause
from receiver.store.sqlite.engine import SQLiteStore
from tests.postgres import Database
from tests.store.parts import (
    NOW,
    Engine,
    arrival,
    ended,
    new,
    pred,
    processing,
    progress,
    sent,
    slots,
    stand,
    submitting,
    unconfirmed,
)

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

# Queued last: `stand` begins the submits of all queued predictions.
EVERY = sorted(Status, key=lambda status: (status is Status.QUEUED, status))
LIVING = [status for status in EVERY if status not in TERMINAL]


async def test_created_prediction_is_read_back_unchanged(store: Store) -> None:
    given = {"input": {"prompt": "ä\u0000\U0001f600", "n": 2**63}, "metadata": {"k": [1, None]}}
    created = await store.predictions.create(new(1, parent_id="pred_0", **given))
    read = await store.predictions.get(pred(1))

    assert created.is_new
    assert read is not None
    assert (read.status, read.input, read.metadata) == (
        Status.QUEUED,
        given["input"],
        given["metadata"],
    )
    assert (read.parent_id, read.output, read.error, read.completed_at) == (
        "pred_0",
        None,
        None,
        None,
    )
    assert await store.predictions.get("pred_none") is None
    assert await store.predictions.job("pred_none") is None


async def test_idempotency_key_always_returns_its_first_prediction(store: Store) -> None:
    await store.predictions.create(new(1, idempotency_key="k", fingerprint="f1"))
    again = await store.predictions.create(new(2, idempotency_key="k", fingerprint="f2"))
    await accept_outcome(store, arrival(1))
    after_its_end = await store.predictions.create(new(3, idempotency_key="k", fingerprint="f1"))

    assert (again.prediction_id, again.is_new, again.fingerprint) == (pred(1), False, "f1")
    assert (after_its_end.prediction_id, after_its_end.is_new) == (pred(1), False)
    assert await store.predictions.get(pred(2)) is None


@pytest.mark.pooled
async def test_concurrent_creates_with_one_idempotency_key_make_one_prediction(
    store: Store,
) -> None:
    created = await asyncio.gather(
        *(store.predictions.create(new(n, idempotency_key="k", fingerprint="f")) for n in range(20))
    )
    assert sum(one.is_new for one in created) == 1
    assert len({one.prediction_id for one in created}) == 1


async def test_predictions_without_an_idempotency_key_are_all_new(store: Store) -> None:
    created = await asyncio.gather(*(store.predictions.create(new(n)) for n in range(5)))
    assert all(one.is_new for one in created)


async def test_only_due_submits_begin_and_the_oldest_first(store: Store) -> None:
    for number in (3, 1, 2, 4):
        await store.predictions.create(new(number))
    await store.predictions.create(new(5, created_at=NOW + 1))
    await store.predictions.create(new(6, provider="oxen"))

    first = await store.predictions.begin_submits(slots(most=2))
    rest = await store.predictions.begin_submits(slots())

    assert [job.ticket.id for job in first.jobs] == [pred(1), pred(2)]
    assert [job.ticket.id for job in rest.jobs] == [pred(3), pred(4)]
    last = await store.predictions.begin_submits(slots())
    assert (last.jobs, last.next_due) == ([], NOW + 1)
    other = await store.predictions.begin_submits(slots(provider="eachlabs"))
    assert (other.jobs, other.next_due) == ([], None)


async def test_begun_submit_returns_the_complete_job(store: Store) -> None:
    await store.predictions.create(new(1, mode="sync"))
    [job] = (await store.predictions.begin_submits(slots())).jobs

    assert job == await store.predictions.job(pred(1))
    assert (job.status, job.submits, job.polls, job.deadline_at) == (
        Status.SUBMITTING,
        1,
        0,
        NOW + 3600,
    )
    assert (job.ticket.mode, job.ticket.submitted_at, job.ticket.cancel_requested) == (
        "sync",
        None,
        False,
    )


@pytest.mark.pooled
@pytest.mark.parametrize(
    ("most", "max_in_flight", "begun"),
    [(10, None, 4), (10, 2, 0), (10, 3, 1), (10, 5, 3), (1, 5, 1), (0, None, 0), (10, 0, 0)],
)
async def test_submits_begin_only_up_to_max_in_flight(
    store: Store, most: int, max_in_flight: int | None, begun: int
) -> None:
    await processing(store, 1)
    await unconfirmed(store, 2)
    await ended(store, 3)  # an ended prediction does not count
    for number in range(4, 8):
        await store.predictions.create(new(number))

    found = await store.predictions.begin_submits(slots(most=most, max_in_flight=max_in_flight))

    assert len(found.jobs) == begun


async def test_concurrent_submit_requests_share_the_in_flight_limit(store: Store) -> None:
    for number in range(10):
        await store.predictions.create(new(number))
    begun = await asyncio.gather(
        *(store.predictions.begin_submits(slots(max_in_flight=4)) for _ in range(5))
    )
    ids = [job.ticket.id for found in begun for job in found.jobs]
    assert sorted(ids) == [pred(number) for number in range(4)]


async def test_in_flight_predictions_are_recounted_only_near_the_limit(
    store: Store,
) -> None:
    for number in range(10):
        await store.predictions.create(new(number))

    async def begin(most: int, at_most: int | None, limit: int | None = 6) -> tuple[int, Any]:
        wish = slots(most=most, max_in_flight=limit, at_most=at_most)
        found = await store.predictions.begin_submits(wish)
        return len(found.jobs), found.at_most

    assert await begin(3, None) == (3, 3)
    await accept_outcome(store, arrival(0))
    assert await begin(2, 3) == (2, 5)  # four are in flight
    assert await begin(2, 5) == (2, 6)
    assert await begin(2, 6) == (0, None)
    await accept_outcome(store, arrival(1))
    assert await begin(2, 6) == (1, 6)
    assert await begin(1, 6, limit=None) == (1, None)


CAUSES: dict[ProgressCause, Cause] = {
    "accepted": Cause.ACCEPTED,
    "postponed": Cause.POSTPONED,
    "ambiguous": Cause.AMBIGUOUS,
}


@pytest.mark.parametrize("cause", CAUSES)
async def test_progress_makes_only_allowed_transitions(
    engine: Engine, cause: ProgressCause
) -> None:
    store = engine.store
    for number, status in enumerate(EVERY):
        if (cause, status) == ("accepted", Status.QUEUED):
            continue  # only a submit that has begun can be accepted
        one = pred(number)
        await stand(store, number, status)
        due_before = engine.column("due_at", one)

        await store.predictions.progress(
            progress(number, cause, NOW + 40, provider_id=f"req-{number}")
        )

        read = await store.predictions.get(one)
        assert read is not None
        assert read.status == TRANSITIONS[status].get(CAUSES[cause], status)
        if status in TERMINAL:
            assert engine.column("due_at", one) is None
        elif read.status == status and cause != "accepted":
            assert engine.column("due_at", one) == due_before


async def test_accepted_submit_after_the_outcome_adds_only_id_and_links(engine: Engine) -> None:
    store = engine.store
    await submitting(store, 1)
    await accept_outcome(store, arrival(1))
    links = {"status_url": "https://queue.fal.run/x"}
    await store.predictions.progress(
        progress(1, "accepted", NOW + 30, provider_id="req-9", links=links)
    )

    job = await store.predictions.job(pred(1))
    assert job is not None
    assert (job.status, job.ticket.provider_id, job.ticket.links) == (
        Status.SUCCEEDED,
        "req-9",
        links,
    )
    assert engine.column("due_at", pred(1)) is None
    assert await store.predictions.find("fal", "req-9") == pred(1)
    assert await store.predictions.find("oxen", "req-9") is None


async def test_accepted_submit_does_not_change_a_known_provider_id(store: Store) -> None:
    await processing(store, 1, provider_id="req-1")
    await store.predictions.progress(progress(1, "accepted", NOW + 30, provider_id="req-2"))
    await store.predictions.progress(progress(1, "accepted", NOW + 30))
    assert await store.predictions.find("fal", "req-1") == pred(1)
    assert await store.predictions.find("fal", "req-2") is None


@pytest.mark.parametrize(
    ("cause", "due_at", "expected"),
    [
        ("accepted", NOW + 30, NOW + 10),
        ("accepted", NOW + 5, NOW + 5),
        ("ambiguous", NOW + 30, NOW + 10),
        ("polled", NOW + 30, NOW + 10),
        ("polled", NOW + 5, NOW + 5),
    ],
)
async def test_requested_poll_is_not_delayed_by_a_later_due_time(
    engine: Engine, cause: ProgressCause, due_at: float, expected: float
) -> None:
    store = engine.store
    await submitting(store, 1)
    if cause == "polled":
        await store.predictions.progress(progress(1, "accepted", NOW))
        [_] = await store.predictions.claim_due("fal", NOW, NOW + 90, 10)
    # An ambiguous callback without an id of the provider: the prediction is polled at once.
    await accept_outcome(store, arrival(1, "ask", at=NOW + 10))

    await store.predictions.progress(progress(1, cause, due_at))

    assert engine.column("due_at", pred(1)) == expected


async def test_inconclusive_poll_does_not_make_the_next_poll_due_at_once(engine: Engine) -> None:
    store = engine.store
    await processing(store, 1)
    [_] = await store.predictions.claim_due("fal", NOW + 30, NOW + 120, 10)
    await accept_outcome(store, arrival(1, "ask", channel="poll", at=NOW + 31))
    await store.predictions.progress(progress(1, "polled", NOW + 60))
    assert engine.column("due_at", pred(1)) == NOW + 60


@pytest.mark.parametrize("cause", ["accepted", "postponed", "ambiguous"])
async def test_due_time_is_never_after_the_deadline(engine: Engine, cause: ProgressCause) -> None:
    await engine.store.predictions.create(new(1))
    await engine.store.predictions.begin_submits(slots(hold_until=NOW + 9e6))
    await engine.store.predictions.progress(progress(1, cause, NOW + 8e6))
    assert engine.column("due_at", pred(1)) == NOW + 3600


async def test_postponed_submit_waits_and_keeps_its_first_deadline(store: Store) -> None:
    await submitting(store, 1)
    await store.predictions.progress(progress(1, "postponed", NOW + 30))

    assert (await store.predictions.begin_submits(slots(now=NOW + 29))).jobs == []
    [job] = (await store.predictions.begin_submits(slots(now=NOW + 30))).jobs
    assert (job.submits, job.deadline_at) == (2, NOW + 3600)


@pytest.mark.usefixtures("in_one_process")
async def test_sleep_of_the_computer_moves_the_deadline_but_not_latest_at(
    engine: Engine,
) -> None:
    store = engine.store
    await store.predictions.create(new(1, latest_at=NOW + 60))
    await store.predictions.create(new(2))
    await store.predictions.begin_submits(slots())
    for number in (1, 2):
        await store.predictions.progress(progress(number, "postponed", NOW + 30, reason="busy"))
    await store.shift(Shift(due=0.0, deadline=100.0), "me", NOW)

    assert await store.predictions.late("fal", NOW + 60, 10) == [(pred(1), "busy")]
    assert await store.predictions.next_late("fal") == NOW + 60
    assert len(await store.predictions.late("fal", NOW + 3699, 10)) == 1
    assert await store.predictions.late("fal", NOW + 3700, 1) == [(pred(1), "busy")]
    assert len(await store.predictions.late("fal", NOW + 3700, 10)) == 2


@pytest.mark.pooled
async def test_due_predictions_are_claimed_once_until_the_hold_expires(store: Store) -> None:
    await processing(store, 1, provider_id="req-1")  # due at +30
    await unconfirmed(store, 2)  # due at +30
    await submitting(store, 3)  # held until +90
    await store.predictions.create(new(4))  # queued: not polled
    await ended(store, 5)

    assert await store.predictions.next_due("fal") == NOW + 30
    assert await store.predictions.claim_due("fal", NOW + 29, NOW + 90, 10) == []
    taken = await store.predictions.claim_due("fal", NOW + 30, NOW + 90, 10)
    assert sorted(job.ticket.id for job in taken) == [pred(1), pred(2)]
    assert await store.predictions.claim_due("fal", NOW + 89, NOW + 150, 10) == []
    assert len(await store.predictions.claim_due("fal", NOW + 90, NOW + 150, 1)) == 1
    assert await store.predictions.next_due("fal") == NOW + 90


async def test_polls_are_counted_and_change_nothing_after_the_end(store: Store) -> None:
    await processing(store, 1)
    await store.predictions.progress(progress(1, "polled", NOW + 40))
    await accept_outcome(store, arrival(1, provider_id="req-1"))
    await store.predictions.progress(progress(1, "polled", NOW + 50))
    job = await store.predictions.job(pred(1))
    assert job is not None
    assert (job.polls, job.status) == (1, Status.SUCCEEDED)


async def test_hasten_makes_predictions_at_the_provider_due_for_a_poll(engine: Engine) -> None:
    for number, status in enumerate(EVERY):
        await stand(engine.store, number, status)
    await engine.store.predictions.hasten("fal", NOW + 1)
    await engine.store.predictions.hasten("oxen", NOW)

    due = {status: engine.column("due_at", pred(n)) for n, status in enumerate(EVERY)}
    assert due == {
        **dict.fromkeys(TERMINAL),
        Status.QUEUED: NOW,
        Status.SUBMITTING: NOW + 90,
        Status.PROCESSING: NOW + 1,
        Status.UNCONFIRMED: NOW + 1,
    }


@pytest.mark.pooled
async def test_cancel_request_is_stored_unless_the_prediction_has_ended(store: Store) -> None:
    for number, status in enumerate(Status):
        await stand(store, number, status)
        await store.predictions.mark_cancel(pred(number))
        job = await store.predictions.job(pred(number))
        assert job is not None
        assert job.ticket.cancel_requested == (status not in TERMINAL)


@pytest.mark.usefixtures("in_one_process")
async def test_recovery_marks_interrupted_submits_as_unconfirmed(engine: Engine) -> None:
    for number, status in enumerate(LIVING):
        await stand(engine.store, number, status)
    await engine.store.recover("me", NOW + 5)
    statuses = dict(engine.rows("SELECT id, status FROM predictions"))
    assert statuses == {
        pred(number): Status.UNCONFIRMED if status is Status.SUBMITTING else status
        for number, status in enumerate(LIVING)
    }
    assert engine.column("due_at", pred(LIVING.index(Status.SUBMITTING))) == NOW + 5


@pytest.mark.pooled
async def test_submit_is_marked_sent_once_and_only_by_its_latest_attempt(store: Store) -> None:
    await store.predictions.create(new(1))
    [first] = (await store.predictions.begin_submits(slots())).jobs
    await store.predictions.progress(progress(1, "ambiguous", NOW))
    assert (await store.predictions.job(pred(1))).status is Status.QUEUED  # type: ignore[union-attr]
    [second] = (await store.predictions.begin_submits(slots())).jobs
    assert not await store.predictions.mark_sent(sent(first))
    assert await store.predictions.mark_sent(sent(second))
    assert not await store.predictions.mark_sent(sent(second))
    found = await store.predictions.job(pred(1))
    assert found is not None
    assert found.ticket.submitted_at == NOW


async def test_late_result_of_an_earlier_submit_changes_nothing(store: Store) -> None:
    await submitting(store, 1)
    await store.predictions.progress(progress(1, "postponed", NOW))
    [second] = (await store.predictions.begin_submits(slots())).jobs
    assert await store.predictions.mark_sent(sent(second))
    job = await store.predictions.job(pred(1))
    of_submits = {"channel": None, "only_from": frozenset({Status.SUBMITTING})}

    for cause in ("postponed", "ambiguous"):
        await store.predictions.progress(progress(1, cause, NOW))
    refused = await accept_outcome(store, arrival(1, "failed", **of_submits, submits=1))

    assert (refused.verdict, refused.reason) == ("late", "begun again")
    assert await store.predictions.job(pred(1)) == job
    refused = await accept_outcome(store, arrival(1, "failed", **of_submits, submits=2))
    assert refused.verdict == "accepted"


async def test_recovery_requeues_submits_that_were_not_sent(engine: Engine) -> None:
    for number in (1, 2):
        await engine.store.predictions.create(new(number))
    [first, _] = (await engine.store.predictions.begin_submits(slots())).jobs
    await engine.store.predictions.mark_sent(sent(first))
    await engine.store.recover("me", NOW + 5)
    statuses = [engine.column("status", pred(number)) for number in (1, 2)]
    if isinstance(engine.store, SQLiteStore):
        assert statuses == [Status.UNCONFIRMED, Status.QUEUED]
    else:  # other processes may be submitting
        assert statuses == [Status.SUBMITTING, Status.SUBMITTING]


async def test_stale_queued_predictions_are_listed(store: Store) -> None:
    await store.predictions.create(new(1, created_at=NOW - 100))
    await store.predictions.create(new(2, created_at=NOW - 10))
    await submitting(store, 3, created_at=NOW - 100, provider="oxen")
    assert await store.predictions.stale("fal", NOW - 50, 10) == [pred(1)]
    assert len(await store.predictions.stale("fal", NOW, 1)) == 1
    assert await store.predictions.stale("oxen", NOW, 10) == []


async def test_rate_limit_per_minute_counts_all_kinds_of_requests(store: Store) -> None:
    for number in range(5):
        await store.predictions.create(new(number))
    turn = RequestPermit(provider="fal", now=NOW, per_minute=3)
    assert await store.limits.take(turn) == 0.0
    later = slots(now=NOW + 20, per_minute=3)
    found = await store.predictions.begin_submits(later)
    assert (len(found.jobs), found.wait) == (2, 0.0)

    assert await store.limits.take(msgspec.structs.replace(turn, now=NOW + 21)) == 39.0
    found = await store.predictions.begin_submits(slots(now=NOW + 50, per_minute=3))
    assert (found.jobs, found.wait) == ([], 10.0)

    assert await store.limits.take(msgspec.structs.replace(turn, now=NOW + 60)) == 0.0
    assert await store.limits.take(msgspec.structs.replace(turn, now=NOW + 61)) == 19.0
    other = msgspec.structs.replace(turn, provider="oxen")
    assert await store.limits.take(other) == 0.0


@pytest.mark.pooled
async def test_concurrent_requests_stay_within_the_rate_limit(store: Store) -> None:
    turn = RequestPermit(provider="fal", now=NOW, per_minute=4)
    waits = await asyncio.gather(*(store.limits.take(turn) for _ in range(9)))
    assert sorted(waits) == [0.0] * 4 + [60.0] * 5


async def test_lease_has_one_owner_until_it_expires_or_is_released(store: Store) -> None:
    role = LeaseRequest(name="stream", owner="me", now=NOW, until=NOW + 6)
    other = msgspec.structs.replace(role, owner="other")
    assert await store.leases.hold(role)
    assert not await store.leases.hold(msgspec.structs.replace(other, now=NOW + 5, until=NOW + 11))
    assert not await store.leases.is_at_work("stream", NOW)

    role = msgspec.structs.replace(role, at_work=True)
    assert await store.leases.hold(msgspec.structs.replace(role, now=NOW + 5, until=NOW + 11))
    assert await store.leases.is_at_work("stream", NOW + 10)
    assert not await store.leases.is_at_work("stream", NOW + 11)

    assert await store.leases.hold(msgspec.structs.replace(other, now=NOW + 11, until=NOW + 17))
    assert not await store.leases.is_at_work("stream", NOW + 12)
    await store.leases.release("stream", "me")
    assert not await store.leases.hold(msgspec.structs.replace(role, now=NOW + 12, until=NOW + 18))
    await store.leases.release("stream", "other")
    assert await store.leases.hold(msgspec.structs.replace(role, now=NOW + 12, until=NOW + 18))


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, [5, 4, 3, 2, 1, 0]),
        ({"status": "queued"}, [4, 2, 0]),
        ({"provider": "oxen"}, [5, 4]),
        ({"provider": "oxen", "status": "queued"}, [4]),
        ({"status": "failed"}, []),
        ({"model": "m[1-4]", "provider": "fal"}, [3, 2, 1]),
        ({"model": "m*", "status": "queued"}, [4, 2, 0]),
        ({"metadata": {"n": "[1-4]", "kind": "avatar"}}, [4, 2]),
        ({"metadata": {"n": "*", "nothing": "*"}}, []),
        ({"model": "M*"}, []),
    ],
)
async def test_pages_contain_each_prediction_once_and_newest_first(
    store: Store, wanted: dict[str, Any], found: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "_SCANNED", 1)  # so that a page takes several reads
    monkeypatch.setattr(predictions, "_MOST_SCANS", 2)
    for number in range(6):
        made = msgspec.structs.replace(
            new(number, provider="oxen" if number > 3 else "fal"),
            model=f"m{number}",
            metadata={"n": number, "kind": "banner" if number % 2 else "avatar"},
        )
        await store.predictions.create(made)
        if number % 2:
            await accept_outcome(store, arrival(number))
    for limit in (1, 2, 6, 50):
        seen: list[str] = []
        cursor = None
        while True:
            page = await store.predictions.page(
                PredictionFilter(**wanted, limit=limit, cursor=cursor)
            )
            seen += [prediction.id for prediction in page.data]
            assert len(page.data) <= limit
            cursor = page.next_cursor
            if cursor is None:
                break
        assert seen == [pred(number) for number in found], limit


async def test_limit_holds_with_any_query_plan(
    bare_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL may run a subquery again for each row, and so choose other rows each time."""
    nested = ("hashjoin", "mergejoin", "hashagg", "sort", "material", "memoize", "bitmapscan")
    plans = {f"enable_{name}": "off" for name in nested}
    monkeypatch.setattr(
        "receiver.store.postgres.sessions._OF_A_SESSION",
        {**_OF_A_SESSION, **plans, "enable_indexscan": "off"},
    )
    store = PostgresStore(bare_database.url, lambda _: None, PgQueuerJobs())
    await store.start()
    try:
        for number in range(8):
            await store.predictions.create(new(number))
        begun = await store.predictions.begin_submits(slots(most=3))
        assert len(begun.jobs) == 3
        for number in range(3):
            await store.predictions.progress(
                progress(number, "accepted", NOW, provider_id=f"r{number}")
            )
        assert len(await store.predictions.claim_due("fal", NOW + 10, NOW + 99, 2)) == 2
    finally:
        await store.stop()
