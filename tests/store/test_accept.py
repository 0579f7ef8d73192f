"""Accepting outcomes: the verdict, the evidence, the event and the deliveries of each.

An internal outcome is one that the receiver itself decides: it has no channel.
"""

import asyncio
from typing import Any

import pytest

from receiver.model.states import TERMINAL
from receiver.model.values import OutcomeKind, Recipients, Status
from receiver.store.facade import Store
from receiver.store.inbox import CurrentState, IncomingOutcome, Transition, accept_outcome
from tests.store.parts import (
    NOW,
    Engine,
    Watch,
    arrival,
    ended,
    judge,
    new,
    outcome,
    pred,
    processing,
    progress,
    stand,
    wanted,
)

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

# Queued comes last: starting submits for the others would submit it too.
LIVING = sorted(set(Status) - TERMINAL, key=lambda one: one is Status.QUEUED)
ENDS: list[OutcomeKind] = ["succeeded", "failed", "canceled"]


def verdicts(engine: Engine) -> dict[str, int]:
    sql = "SELECT verdict, sum(1 + repeats) FROM callbacks GROUP BY verdict"
    return dict(engine.rows(sql))


@pytest.mark.parametrize("kind", ENDS)
async def test_final_outcome_ends_an_unfinished_prediction_with_one_event(
    engine: Engine, kind: OutcomeKind
) -> None:
    store = engine.store
    for number, status in enumerate(LIVING):
        one, name = pred(number), f"req-{number}"
        await stand(store, number, status)
        taken = await accept_outcome(
            store, arrival(number, kind, provider_id=name, handlers=("a", "b"))
        )

        assert (taken.verdict, taken.status, taken.handlers) == ("accepted", kind, ("a", "b"))
        read = await store.predictions.get(one)
        assert read is not None
        assert (read.status, read.channel, read.provider_id) == (kind, "webhook", name)
        ok = kind == "succeeded"
        assert (read.output is None, read.error is None) == (not ok, ok)
        assert read.completed_at is not None
        assert read.completed_at.timestamp() == NOW + 10
        events = "SELECT id, type FROM events WHERE prediction_id = ?"
        assert engine.rows(events, one) == [(taken.event_id, f"prediction.{kind}")]
        pending = "SELECT handler, state, due_at FROM deliveries WHERE prediction_id = ? ORDER BY 1"
        assert engine.rows(pending, one) == [("a", "pending", NOW + 10), ("b", "pending", NOW + 10)]


@pytest.mark.parametrize("first", ENDS)
async def test_late_or_duplicate_outcome_is_recorded_and_changes_nothing_else(
    engine: Engine, first: OutcomeKind
) -> None:
    store = engine.store
    kinds: list[OutcomeKind] = [*ENDS, "ask", "processing", "missing"]
    for number, second in enumerate(kinds):
        await ended(store, number, "a", kind=first)
        before = engine.dump()
        late = arrival(number, second, at=NOW + 99, body=b"later", handlers=("a", "b"))
        taken = await accept_outcome(store, late)

        expected = "late" if second in ENDS and second != first else "duplicate"
        assert (taken.verdict, taken.status, taken.event_id) == (expected, first, None)
        after = engine.dump()
        assert {table for table in before if before[table] != after[table]} == {"callbacks"}
        [(verdict, body, reason)] = engine.rows(
            "SELECT verdict, body, reason FROM callbacks"
            " WHERE received_at = ? AND prediction_id = ?",
            *(NOW + 99, pred(number)),
        )
        assert verdict == expected
        assert body == ("later" if expected == "late" else "")
        assert first in reason


@pytest.mark.pooled
async def test_duplicate_callback_is_counted_and_adds_no_row(engine: Engine) -> None:
    await ended(engine.store, 1, "a")
    before = engine.dump()
    for _ in range(3):
        taken = await accept_outcome(engine.store, arrival(1, handlers=("a",)))
        assert taken.verdict == "duplicate"
    assert engine.rows("SELECT verdict, repeats FROM callbacks") == [("accepted", 3)]
    after = engine.dump()
    del before["callbacks"], after["callbacks"]
    assert after == before


async def test_duplicate_large_callback_is_counted_and_adds_no_row(engine: Engine) -> None:
    body = b"x" * 100_000
    await ended(engine.store, 1, body=body)
    await accept_outcome(engine.store, arrival(1, body=body))
    assert engine.rows("SELECT verdict, repeats, length(body) FROM callbacks") == [
        ("accepted", 1, 100_000)
    ]


async def test_outcomes_of_one_prediction_in_one_batch_make_one_event(
    engine: Engine, watch: Watch
) -> None:
    store = engine.store
    await processing(store, 1)
    commits = watch.commits
    with watch.busy(store):
        waiting = asyncio.gather(
            accept_outcome(store, arrival(1, provider_id="req-1", handlers=("a",))),
            accept_outcome(store, arrival(1, provider_id="req-1", handlers=("a",))),
            accept_outcome(store, arrival(1, "failed", provider_id="req-1", handlers=("a",))),
            accept_outcome(store, arrival(1, "ask", provider_id="req-1", body=b"?")),
            accept_outcome(store, arrival(1, channel="poll", provider_id="req-2")),
        )
        await asyncio.sleep(0)
    taken = await waiting

    assert [one.verdict for one in taken] == [
        "accepted",
        "duplicate",
        "late",
        "duplicate",
        "mismatch",
    ]
    assert watch.commits == commits + 2  # one that kept the writer busy, one for all five
    assert len(engine.rows("SELECT * FROM events")) == 1
    assert len(engine.rows("SELECT * FROM deliveries")) == 1
    assert verdicts(engine) == {"accepted": 2, "late": 1, "duplicate": 1}


@pytest.mark.parametrize("body", [b"small", b"\xff", b"x" * 100_000], ids=len)
async def test_callback_duplicated_in_one_batch_keeps_its_body(
    engine: Engine, watch: Watch, body: bytes
) -> None:
    await engine.store.predictions.create(new(1))
    with watch.busy(engine.store):
        waiting = asyncio.gather(
            *(accept_outcome(engine.store, arrival(1, body=body)) for _ in range(3))
        )
        await asyncio.sleep(0)
    await waiting
    sql = "SELECT verdict, repeats, CAST(body AS BLOB) FROM callbacks"
    assert engine.rows(sql) == [("accepted", 2, body)]


async def test_late_callback_duplicated_in_one_batch_stays_late(
    engine: Engine, watch: Watch
) -> None:
    await ended(engine.store, 1)
    late = arrival(1, "failed", at=NOW + 99, body=b"late")
    with watch.busy(engine.store):
        waiting = asyncio.gather(*(accept_outcome(engine.store, late) for _ in range(2)))
        await asyncio.sleep(0)
    assert [taken.verdict for taken in await waiting] == ["late", "late"]
    assert verdicts(engine) == {"accepted": 1, "late": 2}


async def test_stored_callback_has_headers_times_and_repeat_count(engine: Engine) -> None:
    await ended(engine.store, 1)
    for at in (NOW + 30, NOW + 40):
        await accept_outcome(engine.store, arrival(404, at=at))
    sql = "SELECT verdict, headers, received_at, repeats, repeated_at FROM callbacks ORDER BY 1"
    headers = '[["host","here"]]'
    assert engine.rows(sql) == [
        ("accepted", headers, NOW + 10, 0, None),
        ("unknown", headers, NOW + 30, 1, NOW + 40),
    ]


async def test_ask_outcome_by_webhook_makes_a_poll_due_but_by_poll_does_not(engine: Engine) -> None:
    await processing(engine.store, 1)
    due = engine.column("due_at", pred(1))
    taken = await accept_outcome(engine.store, arrival(1, "ask", channel="poll"))
    assert (taken.verdict, engine.column("due_at", pred(1))) == ("ask", due)
    await accept_outcome(engine.store, arrival(1, "ask"))
    assert engine.column("due_at", pred(1)) == NOW + 10 < due


async def test_accept_result_has_the_known_provider_id_if_the_outcome_has_none(
    engine: Engine,
) -> None:
    await accept_first(engine)
    taken = await accept_outcome(engine.store, arrival(1, "processing", body=b"nameless"))
    assert taken.provider_id == engine.column("provider_id", pred(1)) == "req-1"


async def accept_first(engine: Engine) -> None:
    await processing(engine.store, 1)
    await accept_outcome(engine.store, arrival(1, "processing", provider_id="req-1"))


async def test_provider_id_is_known_to_the_next_outcome_in_the_same_batch(
    engine: Engine, watch: Watch
) -> None:
    store = engine.store
    await stand(store, 1, Status.SUBMITTING)
    with watch.busy(store):
        waiting = asyncio.gather(
            accept_outcome(store, arrival(1, "processing", provider_id="req-1")),
            accept_outcome(store, arrival(1, "succeeded", provider_id="req-2")),
            accept_outcome(store, arrival(1, "failed", provider_id="req-1")),
        )
        await asyncio.sleep(0)
    assert [one.verdict for one in await waiting] == ["noted", "mismatch", "accepted"]
    assert await store.predictions.find("fal", "req-1") == pred(1)


@pytest.mark.pooled
async def test_duplicate_and_replay_leave_one_delivery_per_handler(engine: Engine) -> None:
    await ended(engine.store, 1, "a", "b")
    await accept_outcome(engine.store, arrival(1, handlers=("a", "b", "c")))
    await engine.store.deliveries.replay(
        pred(1), lambda _known, _type: Recipients(("a", "b", "c")), NOW + 30
    )
    handlers = engine.rows("SELECT handler FROM deliveries ORDER BY handler")
    assert handlers == [("a",), ("b",), ("c",)]


async def test_callback_of_an_unknown_prediction_is_stored(engine: Engine) -> None:
    taken = await accept_outcome(engine.store, arrival(404, body=b"strange"))
    assert (taken.verdict, taken.status) == ("unknown", None)
    [row] = engine.rows("SELECT prediction_id, verdict, body FROM callbacks")
    assert row == (pred(404), "unknown", "strange")


async def test_internal_outcome_for_an_unknown_prediction_writes_nothing(engine: Engine) -> None:
    before = engine.dump()
    taken = await accept_outcome(engine.store, arrival(404, "failed", channel=None, body=b""))
    assert taken.verdict == "unknown"
    assert engine.dump() == before


async def test_outcome_with_another_provider_id_is_a_mismatch_and_writes_nothing(
    engine: Engine,
) -> None:
    await processing(engine.store, 1, provider_id="req-1")
    before = engine.dump()
    kinds: list[OutcomeKind] = [*ENDS, "ask", "processing"]
    for kind in kinds:
        taken = await accept_outcome(engine.store, arrival(1, kind, provider_id="req-2"))
        assert taken.verdict == "mismatch"
        assert engine.dump() == before


async def test_outcome_whose_alternative_provider_id_matches_is_accepted(engine: Engine) -> None:
    await processing(engine.store, 1, provider_id="req-1")
    taken = await accept_outcome(
        engine.store, arrival(1, provider_id="gw-1", also_known_as="req-1")
    )
    assert taken.verdict == "accepted"
    assert taken.provider_id == engine.column("provider_id", pred(1)) == "req-1"


@pytest.mark.pooled
async def test_provider_id_in_use_is_a_mismatch_and_the_rest_of_the_batch_commits(
    engine: Engine, watch: Watch
) -> None:
    store = engine.store
    await processing(store, 1, provider_id="req-1")
    for number in (2, 3, 4):
        await stand(store, number, Status.SUBMITTING)
    with watch.busy(store):
        waiting = asyncio.gather(
            accept_outcome(store, arrival(2, provider_id="req-2")),
            accept_outcome(store, arrival(3, provider_id="req-1")),
            accept_outcome(store, arrival(4, "ask", provider_id="req-1")),
            accept_outcome(store, arrival(1, provider_id="req-1")),
            store.predictions.create(new(9)),
        )
        await asyncio.sleep(0)
    two, three, four, one, nine = await waiting

    assert [taken.verdict for taken in (two, three, four, one)] == [
        "accepted",
        "mismatch",
        "mismatch",
        "accepted",
    ]
    assert nine.is_new
    statuses = dict(engine.rows("SELECT id, status FROM predictions"))
    assert statuses == {
        pred(1): "succeeded",
        pred(2): "succeeded",
        pred(3): "submitting",
        pred(4): "submitting",
        pred(9): "queued",
    }
    assert {row[0] for row in engine.rows("SELECT prediction_id FROM callbacks")} == {
        pred(1),
        pred(2),
    }


async def test_two_providers_may_use_the_same_provider_id(store: Store) -> None:
    await processing(store, 1, provider_id="req-1")
    await store.predictions.create(new(2, provider="oxen"))
    taken = await accept_outcome(store, arrival(2, provider="oxen", provider_id="req-1"))
    assert taken.verdict == "accepted"


@pytest.mark.parametrize("status", sorted(Status))
async def test_internal_outcome_applies_only_in_the_statuses_of_only_from(
    engine: Engine, status: Status
) -> None:
    await stand(engine.store, 1, status)
    before = engine.dump()
    ours = arrival(1, "failed", channel=None, only_from=frozenset({Status.UNCONFIRMED}), body=b"")
    taken = await accept_outcome(engine.store, ours)
    if status is Status.UNCONFIRMED:
        read = await engine.store.predictions.get(pred(1))
        assert taken.verdict == "accepted"
        assert read is not None
        assert (read.status, read.channel) == (Status.FAILED, None)
        assert engine.rows("SELECT * FROM callbacks") == []
    else:
        assert (taken.verdict, taken.status) == ("late", status)
        assert engine.dump() == before


@pytest.mark.parametrize(
    ("status", "kind", "name", "expected"),
    [
        (Status.SUBMITTING, "processing", "req-1", Status.PROCESSING),
        (Status.UNCONFIRMED, "ask", "req-1", Status.PROCESSING),
        # The provider does not know this id, so the outcome confirms nothing.
        (Status.UNCONFIRMED, "missing", "req-1", Status.UNCONFIRMED),
        (Status.SUBMITTING, "ask", None, Status.SUBMITTING),
        (Status.PROCESSING, "processing", "req-1", Status.PROCESSING),
        (Status.QUEUED, "processing", "req-1", Status.PROCESSING),
    ],
)
async def test_nonterminal_outcome_with_provider_id_confirms_the_submit(
    engine: Engine, status: Status, kind: OutcomeKind, name: str | None, expected: Status
) -> None:
    await stand(engine.store, 1, status)
    due_before = engine.column("due_at", pred(1))
    taken = await accept_outcome(engine.store, arrival(1, kind, provider_id=name, at=NOW + 10))
    assert engine.column("status", pred(1)) == expected
    assert taken.status == expected
    due = min(due_before, NOW + 10) if kind == "ask" else due_before
    assert engine.column("due_at", pred(1)) == due


async def test_processing_outcome_is_stored_if_by_webhook_not_by_poll_or_stream(
    engine: Engine,
) -> None:
    await processing(engine.store, 1)
    for channel in ("poll", "sse", "webhook"):
        headers = "[]" if channel != "webhook" else '[["host","x"]]'
        await accept_outcome(
            engine.store, arrival(1, "processing", channel=channel, headers=headers)
        )
    assert engine.rows("SELECT channel, verdict FROM callbacks") == [("webhook", "noted")]


async def test_callback_with_another_id_than_the_submit_answer_is_a_mismatch(
    store: Store,
) -> None:
    await stand(store, 1, Status.SUBMITTING)
    await store.predictions.progress(progress(1, "accepted", NOW + 30, provider_id="req-1"))
    taken = await accept_outcome(store, arrival(1, provider_id="req-2"))
    assert taken.verdict == "mismatch"


BODIES = {
    "json": b'{"a": [1, 2.5, "\xc3\xa9", null, true]}',
    "empty": b"",
    "text": b"<html>Bad gateway</html>",
    "escaped NUL": b'{"a": "x\\u0000y"}',
    "raw NUL": b'{"a":\x00}',
    "lone surrogate, escaped": b'{"a": "\\ud800"}',
    "lone surrogate, raw": b'{"a": "\xed\xa0\x80"}',
    "invalid UTF-8": b'\xff\xfe{"a": 1}\x80',
    "overlong UTF-8": b"\xc0\xaf",
    "all bytes": bytes(range(256)),
    "byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "line ends": b"a\r\nb\rc\n\xe2\x80\xa8",
    "quotes": b"it's \"quoted\" \\ 'twice'",
    "just inline": b"x" * (32 * 1024),
    "just too large to inline": b"x" * (32 * 1024 + 1),
    "4 MB": bytes(range(256)) * (4 * 4096),
    "4 MB of text": "ü".encode() * (2 * 1024 * 1024),
    "deep": b"[" * 5000 + b"]" * 5000,
    "number too large": b"1e999",
}


@pytest.mark.pooled
async def test_callback_body_is_stored_byte_for_byte_and_its_event_delivered(
    engine: Engine,
) -> None:
    store = engine.store
    for number, (name, body) in enumerate(BODIES.items()):
        await ended(store, number, "greet", body=body)
        [(kept,)] = engine.rows(
            "SELECT CAST(body AS BLOB) FROM callbacks WHERE prediction_id = ?", pred(number)
        )
        assert kept == body, name

    claims = (await store.claim(wanted(most=100))).claims
    assert {claim.event.prediction.id for claim in claims} == {pred(n) for n in range(len(BODIES))}


@pytest.mark.parametrize(
    ("body", "raw"),
    [
        (b'{"a": [1, "\xc3\xa9\\u0000"]}', {"a": [1, "é\0"]}),
        (b"<html>Bad gateway</html>", "<html>Bad gateway</html>"),
        (b"", ""),
        (b"\xff", None),
    ],
)
async def test_event_payload_is_decoded_json_or_text_or_none(
    store: Store, body: bytes, raw: Any
) -> None:
    await ended(store, 1, "greet", body=body)
    [claim] = (await store.claim(wanted())).claims
    assert claim.event.raw == raw


async def test_event_of_an_internal_outcome_has_no_payload_and_no_channel(store: Store) -> None:
    await ended(store, 1, "greet", kind="failed", channel=None)
    [claim] = (await store.claim(wanted())).claims
    assert (claim.event.raw, claim.event.channel) == (None, None)


async def test_judge_that_raises_fails_only_its_own_item_of_the_batch(
    engine: Engine, watch: Watch
) -> None:
    store = engine.store

    def broken(_known: CurrentState, _arrival: IncomingOutcome) -> Transition:
        raise ZeroDivisionError

    for number in (1, 2, 3):
        await store.predictions.create(new(number))
    with watch.busy(store):
        waiting = asyncio.gather(
            accept_outcome(store, arrival(1)),
            accept_outcome(store, arrival(2, judge=broken)),
            accept_outcome(store, arrival(3)),
            return_exceptions=True,
        )
        await asyncio.sleep(0)
    one, two, three = await waiting
    assert isinstance(two, ZeroDivisionError)
    assert not isinstance(one, BaseException)
    assert not isinstance(three, BaseException)
    assert (one.verdict, three.verdict) == ("accepted", "accepted")
    assert engine.column("status", pred(2)) == "queued"


async def test_judge_sees_the_current_row_inside_the_transaction(store: Store) -> None:
    seen: list[CurrentState] = []

    def note(known: CurrentState, arrival: IncomingOutcome) -> Transition:
        seen.append(known)
        return judge(Recipients())(known, arrival)

    await store.predictions.create(new(1, metadata={"kind": "ä"}))
    await asyncio.gather(*(accept_outcome(store, arrival(1, judge=note)) for _ in range(3)))
    assert [known.status for known in seen] == ["queued", "succeeded", "succeeded"]
    assert {known.metadata for known in seen} == {'{"kind":"ä"}'}


async def test_error_of_a_failed_prediction_is_stored(store: Store) -> None:
    await store.predictions.create(new(1))
    await accept_outcome(store, arrival(1, outcome=outcome("failed")))
    read = await store.predictions.get(pred(1))
    assert read is not None
    assert read.error is not None
    assert (read.error.code, read.error.message) == ("provider_error", "no luck")
