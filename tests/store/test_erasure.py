"""Erasure: no content of the prediction is left anywhere in the database or its files."""

import asyncio
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from receiver.model.ids import delivery_id
from receiver.model.states import TERMINAL
from receiver.model.values import Error, Outcome, Output, Recipients, Status, Stored
from receiver.store.breakers import Breakers
from receiver.store.deliveries import ReplayResult
from receiver.store.erasure import Erasure
from receiver.store.facade import Store
from receiver.store.inbox import accept_outcome
from receiver.store.predictions import Annotation
from tests.patience import PATIENCE
from tests.store.parts import (
    AGAIN,
    GIVEN_UP,
    NOW,
    Engine,
    SQLite,
    arrival,
    claimed,
    ended,
    judge,
    new,
    pred,
    progress,
    settlement,
    slots,
    stand,
    wanted,
)

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

MARKER: Final = "sealing-wax"
THEN: Final = NOW + 1000


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an erasure wait longer for an empty log, as a busy machine may need it."""
    monkeypatch.setattr("receiver.store.sqlite.engine._SCRUBBED_WITHIN", PATIENCE)


def everything(engine: Engine) -> str:
    """Return all that is stored: every row of every table, or the bytes of SQLite's files."""
    if isinstance(engine, SQLite):
        files = sorted(engine.path.parent.glob(f"{engine.path.name}*"))
        tables = [row[0] for row in engine.rows("SELECT name FROM sqlite_master")]
        assert {"callbacks", "steps"} <= set(tables)
        return "".join(file.read_bytes().decode("latin-1") for file in files)
    tables = [
        row[0]
        for row in engine.rows(
            "SELECT table_name::text FROM information_schema.tables WHERE table_schema = 'receiver'"
        )
    ]
    return "".join(
        repr(engine.rows(f"SELECT convert_to(t::text, 'UTF8') FROM {table} t")) for table in tables
    ) + repr(engine.rows("SELECT convert_from(body, 'UTF8') FROM callbacks"))


async def filled(store: Store, *, ok: bool = True) -> None:
    """Store the marker in every place that can hold content."""
    given: dict[str, Any] = {
        "input": {"prompt": MARKER * 500},
        "metadata": {"for": MARKER},
        "idempotency_key": "order-1",
        "fingerprint": f"digest of {MARKER}",
        "reply_to": f"https://x.example/{MARKER}",
    }
    await store.predictions.create(new(1, **given))
    await store.predictions.begin_submits(slots())
    await store.predictions.progress(
        progress(1, "accepted", NOW + 30, links={"status": MARKER}, provider_id="req-1")
    )
    outcome = Outcome(
        kind="succeeded" if ok else "failed",
        output=[Output(url=f"https://x.example/{MARKER}")] if ok else [],
        error=None if ok else Error(code="provider_error", message=MARKER),
    )
    raw: dict[str, Any] = {
        "body": f'{{"prompt": "{MARKER}"}}'.encode() * 400,
        "headers": f'[["x-a", "{MARKER}"]]',
    }
    handlers = Recipients(("good", "bad", "slow", "last"), {"last": ("slow",)})
    await accept_outcome(store, arrival(1, outcome=outcome, judge=judge(handlers), **raw))
    contrary = Outcome(kind="canceled", error=Error(code="canceled", message=MARKER))
    await accept_outcome(store, arrival(1, outcome=contrary, **(raw | {"body": MARKER.encode()})))
    for handler, decision in (("good", None), ("bad", GIVEN_UP), ("slow", AGAIN)):
        [claim] = (await store.claim(wanted(handler))).claims
        await store.deliveries.remember(claim.id, MARKER, f'"{MARKER}"')
        said = (
            {}
            if decision is None
            else {"decision": msgspec.structs.replace(decision, reason=MARKER)}
        )
        await store.settle(settlement(claim, note=MARKER, **said))
    await Breakers(store).trip("bad", NOW, NOW + 60, MARKER)
    kept = Stored(url=f"https://kept.example/{MARKER}", sha256=MARKER, size=1, content_type="a/b")
    await store.deliveries.annotate(
        Annotation(prediction_id=pred(1), stored={0: kept}, metadata={MARKER: MARKER})
    )


@pytest.mark.pooled
@pytest.mark.parametrize("ok", [True, False], ids=["succeeded", "failed"])
async def test_erasure_removes_all_content_and_keeps_ids_states_and_times(
    engine: Engine, store: Store, *, ok: bool
) -> None:
    await filled(store, ok=ok)
    before = await store.predictions.get(pred(1))
    assert before is not None
    assert MARKER in everything(engine)
    assert await Erasure(store).erase(pred(1), THEN) == "erased"
    assert MARKER not in everything(engine)
    after = await store.predictions.get(pred(1))
    assert after is not None
    assert after.erased_at is not None
    assert after.erased_at.timestamp() == THEN
    error = None if ok else Error(code="provider_error", message="")
    assert after == msgspec.structs.replace(
        before,
        input={},
        metadata={},
        reply_to=None,
        output=[] if ok else None,
        error=error,
        erased_at=after.erased_at,
    )
    found = await store.deliveries.page(10, prediction=pred(1))
    states = {one.handler: (one.state, one.reason) for one in found.data}
    assert states == {
        "good": ("done", ""),
        "bad": ("dead", ""),
        "slow": ("skipped", "erased"),
        "last": ("skipped", "erased"),
    }
    verdicts = engine.rows("SELECT verdict, repeats FROM callbacks ORDER BY verdict")
    assert verdicts == [("accepted", 0), ("late", 0)]


async def test_erased_prediction_has_no_pending_deliveries(engine: Engine, store: Store) -> None:
    await filled(store)
    await Erasure(store).erase(pred(1), THEN)
    for handler in ("slow", "last"):
        found = await store.claim(wanted(handler, now=THEN + 1e6, lease_until=THEN + 1e6 + 30))
        assert found.claims == []
        assert found.next_due is None
    if not isinstance(engine, SQLite):
        assert engine.rows("SELECT status::text FROM pgqueuer") == []


async def test_second_erasure_changes_nothing(engine: Engine, store: Store) -> None:
    await filled(store)
    assert await Erasure(store).erase(pred(1), THEN) == "erased"
    before = engine.dump()
    assert await Erasure(store).erase(pred(1), THEN + 5) == "already"
    assert engine.dump() == before
    wishes = (Erasure(store).erase(pred(1), THEN) for _ in range(2))
    assert await asyncio.gather(*wishes) == ["already", "already"]


async def test_unfinished_or_unknown_prediction_is_not_erased(engine: Engine, store: Store) -> None:
    living = [status for status in Status if status not in TERMINAL]
    # Queued comes last: starting submits for the others would submit it too.
    for number, status in reversed(list(enumerate(living))):
        await stand(store, number, status)
    before = engine.dump()
    ends = [await Erasure(store).erase(pred(number), THEN) for number in range(len(living) + 1)]
    assert ends == [*(["living"] * len(living)), "missing"]
    assert engine.dump() == before


async def test_erasure_is_rejected_while_a_handler_is_running(engine: Engine, store: Store) -> None:
    claim = await claimed(store)
    before = engine.dump()
    assert await Erasure(store).erase(pred(1), THEN) == "running"
    assert engine.dump() == before
    await store.settle(settlement(claim))
    assert await Erasure(store).erase(pred(1), THEN) == "erased"


async def test_content_stays_erased_after_late_callbacks_retries_and_replays(
    engine: Engine, store: Store
) -> None:
    """Also after results of an old handler and a late answer to the submit."""
    await filled(store)
    await Erasure(store).erase(pred(1), THEN)
    said: dict[str, Any] = {"headers": f'[["x-a", "{MARKER}"]]', "body": f'"{MARKER}"'.encode()}
    assert (await accept_outcome(store, arrival(1, **said))).verdict == "duplicate"
    assert (await accept_outcome(store, arrival(1, "failed", **said))).verdict == "late"
    again = {**said, "body": f'"{MARKER} again"'.encode()}
    assert (await accept_outcome(store, arrival(1, "failed", **again))).verdict == "late"
    await store.deliveries.annotate(Annotation(prediction_id=pred(1), metadata={"for": MARKER}))
    await store.deliveries.remember(delivery_id(pred(1), "good"), MARKER, f'"{MARKER}"')
    await store.predictions.progress(progress(1, "accepted", NOW, links={"status": MARKER}))
    assert await store.deliveries.retry(delivery_id(pred(1), "bad"), THEN) is None
    assert await store.deliveries.retry(delivery_id(pred(1), "slow"), THEN) is None
    replayed = await store.deliveries.replay(
        pred(1), lambda _known, _kind: Recipients(("good",)), THEN
    )
    assert replayed == ReplayResult(0, erased=True)
    await store.scrub()
    assert MARKER not in everything(engine)


async def test_erased_prediction_keeps_its_idempotency_key_without_fingerprint(
    store: Store,
) -> None:
    await filled(store)
    await Erasure(store).erase(pred(1), THEN)
    created = await store.predictions.create(new(2, idempotency_key="order-1", fingerprint="f"))
    assert (created.prediction_id, created.is_new, created.fingerprint) == (pred(1), False, None)


async def test_erasure_leaves_other_predictions_unchanged(engine: Engine, store: Store) -> None:
    await ended(store, 2, "greet")
    before = engine.rows("SELECT * FROM callbacks WHERE prediction_id = ?", pred(2))
    await filled(store)
    await Erasure(store).erase(pred(1), THEN)
    assert engine.rows("SELECT * FROM callbacks WHERE prediction_id = ?", pred(2)) == before
    [claim] = (await store.claim(wanted())).claims
    assert claim.event.raw == {"status": "succeeded"}


async def test_scrub_waits_for_an_open_reader_and_then_empties_the_wal(tmp_path: Path) -> None:
    """A read transaction on an older snapshot delays the scrub, but not the writer."""
    engine = SQLite(tmp_path / "receiver.db")
    log = tmp_path / "receiver.db-wal"
    store = engine.store
    await store.start()
    try:
        await store.predictions.create(new(1))
        with engine.reading() as reader:
            await store.predictions.create(new(2))
            done = asyncio.create_task(store.scrub())
            await store.predictions.create(new(3))
            assert not done.done()
            assert reader.execute("SELECT count(*) FROM predictions").fetchone() == (1,)
        assert await done
        assert log.stat().st_size == 0
    finally:
        await store.stop()
