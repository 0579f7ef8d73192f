"""Real processes on loopback are killed repeatedly while the providers have all faults."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from receiver.deliveries.heartbeat import TIMING
from tests.journey.parts import (
    ACCEPTS,
    FAULTS,
    World,
    check_books,
    check_logs,
    eventually,
    let_leases_end,
    living,
    prompts,
    some_of,
)
from tests.patience import PATIENCE
from tests.postgres import Database

pytestmark = pytest.mark.timeout(600)

_HELD = (30, 90)
"""Seconds after a kill between which the predictions that the process held become due."""


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> Database | None:
    """Return an empty PostgreSQL database, or None for a SQLite file."""
    if request.param == "sqlite":
        return None
    made: Database = request.getfixturevalue("bare_database")
    return made


@contextmanager
def running(
    folder: Path, database: Database | None, *options: Sequence[str], **env: str
) -> Iterator[World]:
    """Run one process on SQLite; on PostgreSQL, a server for each of `options` and two workers."""
    if database is None:
        with living(folder, more=env) as world:
            yield world
    else:
        with living(folder, database, servers=options, workers=2, more=env) as world:
            yield world


def test_records_agree_after_repeated_kills_and_provider_faults(
    tmp_path: Path, database: Database | None
) -> None:
    with running(tmp_path, database, (), ACCEPTS) as world:
        chaos(world)


def chaos(world: World) -> None:
    world.break_with(*FAULTS)
    chance = random.Random(5)
    waves = [prompts()[first::3] for first in range(3)]
    submits = []
    died = 0.0
    with ThreadPoolExecutor(20) as callers:
        for wave in waves:
            world.proxy.kills_wanted = 1
            submits += [callers.submit(world.submit, *one, key=one[1]) for one in wave]
            eventually(lambda: world.proxy.kills_wanted == 0)
            for process in (*some_of(world.servers, chance), *some_of(world.workers, chance)):
                process.kill()
            world.revive()
            time.sleep(chance.uniform(0.05, 0.4))  # to vary the moment of the next kill
            for process in world.fleet if wave is waves[-1] else some_of(world.fleet, chance):
                process.kill()
            died = time.time()
            world.break_with(*FAULTS, {"fault": "cut_stream"})
            world.revive()
        predictions = [submit.result(PATIENCE) for submit in submits]

    let_time_pass(world, died)
    world.settle(3 * PATIENCE)
    assert len({prediction["id"] for prediction in predictions}) == 60
    check_books(world, 60)


def let_time_pass(world: World, died: float) -> None:
    """Release at once what killed processes held, instead of waiting until it expires."""
    if world.database is None:
        return
    first, last = (died + seconds for seconds in _HELD)
    world.database.execute(
        f"UPDATE receiver.predictions SET due_at = {died} WHERE due_at > {first}"
        f" AND due_at <= {last}",
        # Jobs that were picked, and whose deliveries were not claimed yet.
        f"UPDATE receiver.pgqueuer SET heartbeat = heartbeat - interval '{TIMING.lease} s'"
        f" WHERE status = 'picked' AND heartbeat <= to_timestamp({died})"
        " AND dedupe_key IN (SELECT id FROM receiver.deliveries WHERE state = 'pending')",
    )
    let_leases_end(world, *set[str]().union(*(process.killed for process in world.fleet)))


def test_sigterm_ends_all_processes_despite_hanging_handlers_and_loses_nothing(
    tmp_path: Path, database: Database | None
) -> None:
    # The prediction that never ends must not reach its deadline, even on a slow machine.
    calm = {"HANG": "1", "RECEIVER_PREDICTION_TIMEOUT": "600"}
    with running(tmp_path, database, ACCEPTS, ACCEPTS, **calm) as world:
        stop_over_hanging_handlers(world)


def stop_over_hanging_handlers(world: World) -> None:
    hanging = world.submit("fal", "to hang on", "hang-1", kind="hang")
    eventually(lambda: len(world.notes("hung")) == 2)
    answers: list[dict[str, Any]] = []

    def wait_for_an_end() -> None:
        answers.append(world.submit("eachlabs", "[never]", "never-1", prefer="wait=60"))

    waiting = threading.Thread(target=wait_for_an_end, daemon=True)
    waiting.start()
    # This state shows that a server has the request; it answers only at the end, or when it stops.
    submitted = "SELECT id FROM predictions WHERE provider = 'eachlabs' AND status = 'processing'"
    eventually(lambda: world.rows(submitted))
    assert answers == []
    for process in world.fleet:
        process.send(signal.SIGTERM)
    for process in world.fleet:
        assert process.running is not None
        assert process.running.wait(PATIENCE) in {0, -signal.SIGTERM}
    waiting.join(PATIENCE)
    [never] = answers
    assert never["status"] == "processing"
    assert dict(world.rows("SELECT handler, state FROM deliveries")) == {
        "async-hang": "pending",
        "sync-hang": "pending",
    }

    for process in world.fleet:
        del process.env["HANG"]
    world.revive()
    sql = "SELECT handler, state FROM deliveries"
    done = {"async-hang": "done", "sync-hang": "done"}
    eventually(lambda: dict(world.rows(sql)), lambda found: found == done)
    assert world.read(hanging)["status"] == "succeeded"
    assert world.read(never)["status"] == "processing"
    assert world.rows("SELECT count(*), count(DISTINCT prediction_id) FROM events") == [(1, 1)]
    check_logs(world)
