"""Counts of the backlog: correct on both engines, and each read from an index."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from receiver.model.values import Status
from receiver.store.backlog import LIVING, BacklogReader, sql
from receiver.store.breakers import Breakers
from receiver.store.facade import Store
from receiver.store.sqlite.engine import SQLiteStore
from tests.store.parts import AGAIN, GIVEN_UP, NOW, ended, settlement, stand, wanted
from tests.store.test_deliveries import greet_only

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

PROVIDERS = ("fal", "oxen")


async def test_empty_store_has_no_backlog(store: Store) -> None:
    depth = await BacklogReader(store).depth(PROVIDERS)
    assert (depth.pending, depth.oldest) == ({}, {})
    assert depth.living == {(name, status): 0 for name in PROVIDERS for status in LIVING}


async def test_handlers_with_paused_or_open_breakers_are_listed_as_held(store: Store) -> None:
    breakers = Breakers(store)
    await breakers.pause("greet", NOW)
    await breakers.trip("save", NOW, NOW + 60, "down")
    await breakers.trip("both", NOW, NOW + 60, "down")
    await breakers.pause("both", NOW)
    assert (await BacklogReader(store).depth(PROVIDERS)).held == {
        "greet": "paused",
        "save": "open",
        "both": "paused",
    }
    for name in ("greet", "save", "both"):
        await breakers.resume(name)
    assert (await BacklogReader(store).depth(PROVIDERS)).held == {}


async def test_deliveries_are_counted_by_handler_and_state(store: Store) -> None:
    for number in (1, 2, 3):
        await ended(store, number, "greet", "save", at=NOW + number)
    [first] = (await store.claim(wanted("greet", most=1))).claims
    depth = await BacklogReader(store).depth(PROVIDERS)
    assert depth.pending == {
        ("greet", "pending"): 2,
        ("greet", "running"): 1,
        ("save", "pending"): 3,
    }
    assert depth.oldest == {"greet": NOW + 1, "save": NOW + 1}
    await store.settle(settlement(first))
    for claim in (await store.claim(wanted("save"))).claims:
        await store.settle(settlement(claim))
    depth = await BacklogReader(store).depth(PROVIDERS)
    assert depth.pending == {("greet", "pending"): 2}
    assert depth.oldest == {"greet": NOW + 2}


async def test_age_of_a_retried_delivery_counts_from_its_event(store: Store) -> None:
    await ended(store, 1, "greet", at=NOW + 1)
    [claim] = (await store.claim(wanted("greet"))).claims
    await store.settle(settlement(claim, AGAIN))
    assert (await BacklogReader(store).depth(PROVIDERS)).oldest == {"greet": NOW + 1}


async def test_age_of_a_replayed_delivery_counts_from_the_replay(store: Store) -> None:
    taken = await ended(store, 1, "greet", at=NOW + 1)
    [claim] = (await store.claim(wanted("greet"))).claims
    await store.settle(settlement(claim))
    assert taken.event_id is not None
    await store.deliveries.replay(claim.event.prediction.id, greet_only, NOW + 5000)
    depth = await BacklogReader(store).depth(PROVIDERS)
    assert (depth.pending, depth.oldest) == ({("greet", "pending"): 1}, {"greet": NOW + 5000})


async def test_unfinished_predictions_are_counted_by_provider_and_status(store: Store) -> None:
    # Queued comes last: starting submits for the others would submit it too.
    statuses = [status for status in Status if status is not Status.QUEUED]
    for number, status in enumerate([*statuses, Status.QUEUED], 1):
        await stand(store, number, status)
    living = (await BacklogReader(store).depth(PROVIDERS)).living
    assert {status: living["fal", status] for status in LIVING} == dict.fromkeys(LIVING, 1)
    assert not any(living["oxen", status] for status in LIVING)


async def test_overdue_count_excludes_deliveries_that_a_breaker_holds_back(
    store: Store,
) -> None:
    for number in (1, 2, 3):
        await ended(store, number, "greet", "save", at=NOW + number)
    [claim] = (await store.claim(wanted("greet", most=1))).claims
    await store.settle(settlement(claim, GIVEN_UP))
    await stand(store, 4, Status.PROCESSING)
    breakers = Breakers(store)
    depth = await BacklogReader(store).depth(PROVIDERS, NOW + 3600)
    assert (depth.dead, depth.overdue_deliveries, depth.overdue_predictions) == (1, 5, 1)
    assert depth.of_handlers() == {"greet": 2, "save": 3}
    await breakers.pause("greet", NOW)
    await breakers.trip("save", NOW, NOW + 7200, "down")
    depth = await BacklogReader(store).depth(PROVIDERS, NOW + 3600)
    assert (depth.overdue_deliveries, depth.reasons) == (0, {"greet": "", "save": "down"})
    # An open breaker past its wait holds nothing back: a probe should have run by then.
    assert (await BacklogReader(store).depth(PROVIDERS, NOW + 7300)).overdue_deliveries == 3
    depth = await BacklogReader(store).depth(PROVIDERS)
    assert (depth.overdue_deliveries, depth.overdue_predictions) == (0, 0)


def test_every_count_uses_an_index(tmp_path: Path) -> None:
    path = tmp_path / "receiver.db"
    store = SQLiteStore(str(path), print)
    store.open()
    store.close()
    with closing(sqlite3.connect(path)) as connection:
        plan = connection.execute(
            f"EXPLAIN QUERY PLAN {sql.count_all.sqlite}", {"rows": "[]", "before": 0.0}
        )
        tables = [row[3] for row in plan if re.search(r" (d|p|deliveries)\b", row[3])]
        assert len(tables) >= 8
        assert all(re.search(r"INDEX (deliveries|predictions)_\w+", step) for step in tables)
