"""Several processes on one PostgreSQL database act as one receiver."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from receiver.store.schema import migrations
from tests.journey.parts import ACCEPTS, Process, World, check_logs, eventually, living
from tests.postgres import Database

pytestmark = pytest.mark.timeout(600)

# Lock the table that both servers count until both wait for it: then they count simultaneously.
_UNTIL_BOTH_COUNT = (
    "BEGIN",
    "LOCK TABLE receiver.requests IN ACCESS EXCLUSIVE MODE",
    """
    DO $$ BEGIN
        FOR turn IN 1..300 LOOP
            PERFORM pg_stat_clear_snapshot();
            IF (SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                AND wait_event_type = 'Lock') >= 2 THEN RETURN; END IF;
            PERFORM pg_sleep(0.02);
        END LOOP;
        RAISE EXCEPTION 'the two servers never met';
    END $$
    """,
    "COMMIT",
)
_IS_HELD = """
SELECT pid FROM pg_locks
WHERE relation = 'receiver.requests'::regclass AND mode = 'AccessExclusiveLock' AND granted
"""
_LONG = 600
_CALM = {"RECEIVER_PREDICTION_TIMEOUT": "120", "RECEIVER_POLL_AFTER": "100"}


def test_six_processes_start_at_once_on_an_empty_database(
    tmp_path: Path, bare_database: Database
) -> None:
    servers = [(), ACCEPTS, ACCEPTS]
    with living(tmp_path, bare_database, servers=servers, workers=3, more=_CALM) as world:
        for process in world.fleet:
            eventually(lambda one=process: one.said("receiver.started"))  # type: ignore[misc]
            told = [line["event"] for line in process.lines() if line["level"] != "info"]
            assert set(told) <= {"schema.waiting"}  # logged if the first process migrates for long
        numbers = world.rows("SELECT number FROM migrations ORDER BY number")
        assert numbers == [(number + 1,) for number in range(len(migrations("postgres")))]
        assert world.ended(world.submit("fal", "the first", "first"))["status"] == "succeeded"
        world.settle()
        assert len(world.notes("seen")) == 2
        check_logs(world)


def test_rate_limit_and_in_flight_limit_hold_across_two_servers(
    tmp_path: Path, bare_database: Database
) -> None:
    limits = {"EACHLABS_MAX_IN_FLIGHT": "2", "EACHLABS_REQUESTS_PER_MINUTE": "12"}
    with living(
        tmp_path,
        bare_database,
        servers=[ACCEPTS, ACCEPTS],
        more={**_CALM, **limits},
        emulated={"eachlabs_in_flight": 2, "generation": 0.2},
    ) as world:
        with ThreadPoolExecutor(17) as callers:
            meeting = callers.submit(bare_database.execute, *_UNTIL_BOTH_COUNT)
            eventually(lambda: world.rows(_IS_HELD))
            list(callers.map(lambda n: submit_to(world, n), range(16)))
            meeting.result()
        eventually(lambda: ends(world) == 12)
        move_requests(bare_database, _LONG)  # so that no real minute passes on a slow machine
        # Both servers look for room again, but the rate limit is used up.
        late = [submit_to(world, number) for number in (16, 17)]
        assert [one["status"] for one in late] == ["queued", "queued"]
        assert requests(world) == 12

        move_requests(bare_database, -_LONG - 60)
        eventually(lambda: ends(world) == 18)
        assert requests(world) == 18
        ledger = world.ledger()
        assert ledger["violations"] == []
        assert ledger["requests"]["eachlabs"]["rejected"] == 0
        assert len(ledger["predictions"]) == 18
        check_logs(world)


def submit_to(world: World, number: int) -> dict[str, Any]:
    server = world.servers[number % 2]
    return world.submit("eachlabs", f"picture {number}", f"key-{number}", server=server)


def ends(world: World) -> int:
    [[count]] = world.rows("SELECT count(*) FROM predictions WHERE status = 'succeeded'")
    return int(count)


def requests(world: World) -> int:
    """Count all requests to the provider."""
    return sum(world.ledger()["requests"]["eachlabs"].values())


def move_requests(database: Database, seconds: int) -> None:
    """Move the times of the counted requests, as if they were sent later or earlier."""
    database.execute(f"UPDATE receiver.requests SET at = at + {seconds}")


def test_waiting_client_gets_a_callback_that_reached_another_server(
    tmp_path: Path, bare_database: Database
) -> None:
    with living(tmp_path, bare_database, servers=[ACCEPTS, ACCEPTS], more=_CALM) as world:
        asked, called = world.servers
        world.proxy.servers = [called]
        for number, provider in enumerate(("fal", "eachlabs", "fal")):
            seconds, found = timed(lambda n=number, p=provider: wait_at(world, asked, n, p))  # type: ignore[misc]
            assert (found["status"], found["channel"]) == ("succeeded", "webhook")
            # Without a notification, the client would wait for all of its 60 seconds.
            assert seconds < 60
            # The notification may be faster than the answer to the callback.
            heard = eventually(lambda f=found: world.proxy.statuses(f["id"]))  # type: ignore[misc]
            assert heard == [200]
        # A log line is written after the commit that it reports.
        eventually(lambda: len(called.said("outcome.taken", verdict="accepted")) == 3)
        assert not asked.said("outcome.taken")
        check_logs(world)


def wait_at(world: World, server: Process, number: int, provider: str) -> dict[str, Any]:
    key = f"wait-{number}"
    return world.submit(provider, f"waited for {number}", key, server=server, prefer="wait=60")


def timed(act: Callable[[], dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    began = time.monotonic()
    found = act()
    return time.monotonic() - began, found
