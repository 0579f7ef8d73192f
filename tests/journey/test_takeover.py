"""Failover: another process continues the work of one that stopped, died or froze."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.journey.parts import (
    ACCEPTS,
    Process,
    World,
    check_books,
    check_logs,
    eventually,
    let_leases_end,
    living,
    start_all,
)
from tests.patience import PATIENCE
from tests.postgres import Database, OwnServer

pytestmark = pytest.mark.timeout(600)

_LEASE = 30.0
_DONE = """
SELECT prediction_id, count(*) FROM attempts JOIN deliveries ON id = delivery_id
WHERE result = 'done' GROUP BY prediction_id
"""


# --- a rolling restart ---


def test_rolling_restart_under_load_loses_no_prediction(
    tmp_path: Path, bare_database: Database
) -> None:
    calm = {"RECEIVER_PREDICTION_TIMEOUT": "120"}
    with living(tmp_path, bare_database, servers=[(), ACCEPTS], workers=2, more=calm) as world:
        orders = [(("fal", "eachlabs", "oxen")[n % 3], f"picture {n}") for n in range(60)]
        with ThreadPoolExecutor(10) as callers:
            submits = []
            for first in (0, 20):
                submits += [
                    callers.submit(world.submit, *one, key=one[1])
                    for one in orders[first : first + 20]
                ]
                replace_the_oldest(world)
            submits += [callers.submit(world.submit, *one, key=one[1]) for one in orders[40:]]
            for submit in submits:
                submit.result(2 * PATIENCE)

        # A submit under way in a server that stopped is unconfirmed, and no other server touches
        # it for 90 seconds: until then only a callback can end it.
        world.settle(3 * PATIENCE)
        ends = "SELECT status, count(*) FROM predictions GROUP BY status"
        assert world.rows(ends) == [("succeeded", 60)]
        # No attempt was interrupted, so none was repeated.
        assert len(world.notes("seen")) == 2 * 60
        assert {status for _, status in world.proxy.answers} == {200}
        check_books(world, 60)


def replace_the_oldest(world: World) -> None:
    """Start a new server and a new worker, then stop the oldest ones."""
    old = [world.servers[0], world.workers[0]]
    new = [world.new_server(), world.new_worker()]
    start_all(new)
    world.servers.append(new[0])
    world.workers.append(new[1])
    for process in old:
        process.send(signal.SIGTERM)
    for process in old:
        assert process.running is not None
        assert process.running.wait(PATIENCE) in {0, -signal.SIGTERM}
    del world.servers[0], world.workers[0]
    world.retired += old


# --- dead and frozen workers ---


def test_deliveries_of_a_dead_or_frozen_worker_are_taken_over(
    tmp_path: Path, bare_database: Database
) -> None:
    calm = {"RECEIVER_PREDICTION_TIMEOUT": "120"}
    with living(tmp_path, bare_database, servers=[ACCEPTS], workers=1, more=calm) as world:
        [dead] = world.workers
        orphaned = world.submit("fal", "for one that dies", "orphaned", kind="long")
        eventually(lambda: world.begun(orphaned, dead) == 2)
        dead.kill()
        frozen, other = world.new_worker(), world.new_worker()
        world.retired += world.workers
        world.workers[:] = [frozen, other]
        frozen.start()
        kept = world.submit("eachlabs", "for one that freezes", "kept", kind="long")
        eventually(lambda: world.begun(kept, frozen) == 2)
        frozen.send(signal.SIGSTOP)
        other.start()
        assert world.begun(kept, other) == world.begun(orphaned, other) == 0

        let_leases_end(world, *dead.killed, frozen.pid)
        for prediction in (orphaned, kept):
            eventually(lambda p=prediction: world.begun(p, other) == 2, patience=_LEASE + PATIENCE)  # type: ignore[misc]
        # The frozen worker ends late, while the other one still runs; this changes nothing.
        world.release(frozen)
        frozen.send(signal.SIGCONT)
        lost = {"prediction": kept["id"], "result": "done", "state": "claim lost"}
        eventually(lambda: len(frozen.said("handler.attempt", **lost)) == 2)
        assert owners(world) == {other.pid}
        assert world.rows("SELECT result, count(*) FROM attempts GROUP BY 1") == [("lost", 4)]

        world.release(other)
        world.settle()
        check_two_attempts_each(world, other)
        check_logs(world)


def owners(world: World) -> set[str]:
    """Return the ids of the processes that hold deliveries."""
    rows = world.rows("SELECT owner FROM deliveries WHERE state = 'running'")
    return {owner.split(":")[-2] for (owner,) in rows}


def check_two_attempts_each(world: World, last: Process) -> None:
    """Check that each first attempt is lost, and each second one done by the process `last`."""
    deliveries = world.rows("SELECT id, state, attempts, claims FROM deliveries")
    assert len(deliveries) == 4
    assert {tuple(rest) for _, *rest in deliveries} == {("done", 2, 2)}
    history = world.rows("SELECT delivery_id, number, result FROM attempts")
    expected = ((1, "lost"), (2, "done"))
    assert sorted(history) == sorted((one[0], *end) for one in deliveries for end in expected)
    # A log line is written after the commit that it reports.
    eventually(lambda: len(last.said("handler.attempt", state="done", attempt=2)) == 4)
    # No job is left that would run a delivery again.
    assert world.rows("SELECT count(*) FROM pgqueuer") == [(0,)]


# --- a database outage ---


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[OwnServer]:
    server = OwnServer(tmp_path / "postgres")
    yield server
    server.close()


def test_processes_recover_by_themselves_after_a_database_outage(
    tmp_path: Path, own_server: OwnServer
) -> None:
    # Polls start too late: only callbacks and the stream can end the predictions in time.
    calm = {"RECEIVER_PREDICTION_TIMEOUT": "120", "RECEIVER_POLL_AFTER": "100"}
    with living(tmp_path, own_server.base, servers=[(), ACCEPTS], workers=2, more=calm) as world:
        before = world.ended(world.submit("fal", "[fast]", "before", kind="long"))
        eventually(lambda: len(world.notes("begun")) == 2)
        calls = [world.submit("fal", f"[slow] {n}", f"call-{n}") for n in range(6)]
        streamed = world.submit("oxen", "[slow] heard by nobody", "streamed")
        assert readiness(world) == [200, 200]
        own_server.stop_at_once()

        assert eventually(lambda: readiness(world), lambda found: found == [503, 503])
        world.release(*world.fleet)
        eventually(lambda: len(world.notes("ended")) == 2)
        refused = [call["id"] for call in calls]
        eventually(lambda: all(503 in world.proxy.statuses(call) for call in refused))
        answer = world.http.post(
            f"{world.servers[0].url}/v1/predictions",
            json={"provider": "fal", "model": "m", "input": {"prompt": "while it is away"}},
        )
        assert answer.status_code == 503
        own_server.start()

        eventually(lambda: readiness(world), lambda found: found == [200, 200])
        ends = [world.ended(call) for call in calls]
        assert {(end["status"], end["channel"]) for end in ends} == {("succeeded", "webhook")}
        assert {status for _, status in world.proxy.answers} == {200, 503}
        assert world.ended(streamed)["status"] == "succeeded"
        world.settle()
        done = {one["id"]: 2 for one in (before, streamed, *calls)}
        assert dict(world.rows(_DONE)) == done
        eventually(lambda: stream_role(world)[1:] == [1])
        assert world.ended(world.submit("oxen", "afterwards", "after"))["channel"] == "sse"
        world.settle()
        assert len(world.notes("seen")) == 2 * 8
        for process in world.fleet:
            reasons = [line["reason"] for line in process.said("news.interrupted")]
            assert reasons
            assert all(one != next_one for one, next_one in itertools.pairwise(reasons))
        check_logs(world)


def readiness(world: World) -> list[int]:
    """Return the status of each server's /readyz; -1 if it does not answer."""
    found = []
    for server in world.servers:
        try:
            found.append(
                httpx.get(server.url + "/readyz", timeout=PATIENCE, verify=False).status_code
            )
        except httpx.HTTPError:
            found.append(-1)
    return found


# --- Oxen's stream ---


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_another_server_takes_over_the_stream_of_a_dead_or_frozen_listener(
    tmp_path: Path, bare_database: Database, blow: signal.Signals
) -> None:
    calm = {"RECEIVER_PREDICTION_TIMEOUT": "120", "RECEIVER_POLL_AFTER": "100"}
    with living(tmp_path, bare_database, servers=[ACCEPTS, ACCEPTS], more=calm) as world:
        listens = eventually(lambda: stream_role(world), lambda found: found[1:] == [1])[0]
        eventually(lambda: world.streams() == 1)
        world.servers.sort(key=lambda server: server.pid == listens)
        other, listener = world.servers
        first = world.submit("oxen", "heard by the one", "first", server=other)
        assert world.ended(first)["channel"] == "sse"

        gone = listener.pid
        listener.send(blow)
        let_leases_end(world, gone)
        eventually(lambda: stream_role(world) == [other.pid, 1], patience=PATIENCE)
        second = world.submit("oxen", "heard by the other", "second", server=other)
        assert world.ended(second)["channel"] == "sse"

        # A listener that was frozen closes its stream, as another one has the lease now.
        listener.send(signal.SIGCONT)
        eventually(lambda: world.streams() == 1)
        assert stream_role(world) == [other.pid, 1]
        assert world.rows("SELECT count(*) FROM events") == [(2,)]
        check_logs(world)


def stream_role(world: World) -> list[Any]:
    """Return which process holds the lease of Oxen's stream, and whether it is connected."""
    rows = world.rows("SELECT owner, at_work FROM leases WHERE name = 'stream oxen'")
    return [part for owner, at_work in rows for part in (owner.split(":")[-2], at_work)]
