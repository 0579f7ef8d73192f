"""A bulk replay whose process is killed in the middle redelivers each event exactly once."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from receiver.model.ids import delivery_id
from tests.journey.parts import (
    ACCEPTS,
    Process,
    World,
    check_logs,
    eventually,
    let_leases_end,
    living,
)
from tests.patience import PATIENCE
from tests.postgres import Database

pytestmark = pytest.mark.timeout(600)

_MANY = 900


def test_replay_continues_after_its_process_is_killed_and_restarted(tmp_path: Path) -> None:
    with living(tmp_path) as world:
        fill(world)
        replay_over_a_death(world, world.servers[0])
        check_logs(world)


def test_replay_of_a_killed_process_is_taken_over_by_another(
    tmp_path: Path, bare_database: Database
) -> None:
    with living(tmp_path, bare_database, servers=[(), ACCEPTS]) as world:
        fill(world)
        replay_over_a_death(world, None)
        check_logs(world)


def fill(world: World) -> None:
    """Insert old events with one dead delivery each."""
    tables: dict[str, list[str]] = {"predictions": [], "events": [], "deliveries": []}
    for number in range(_MANY):
        name = f"pred_{number:032x}"
        tables["predictions"].append(
            f"('{name}', 'fal', 'm', 'queue', 'succeeded', '{{\"prompt\": \"x\"}}', "
            f"'{{\"kind\": \"journey\"}}', '[]', 1, 1)"
        )
        tables["events"].append(f"('{name}', 'prediction.succeeded', 1)")
        delivery = delivery_id(name, "async-witness")
        tables["deliveries"].append(f"('{delivery}', '{name}', 'async-witness', 'dead', 1, 1)")
    columns = {
        "predictions": "id, provider, model, mode, status, input, metadata, output, created_at, "
        "completed_at",
        "events": "prediction_id, type, time",
        "deliveries": "id, prediction_id, handler, state, created_at, ended_at",
    }
    for table, rows in tables.items():
        write(world, f"INSERT INTO {table} ({columns[table]}) VALUES {', '.join(rows)}")


def write(world: World, sql: str) -> None:
    if world.database is not None:
        world.database.execute(f"SET search_path = receiver; {sql}")
        return
    with closing(sqlite3.connect(world.folder / "receiver.db")) as connection, connection:
        connection.execute(sql)


def replay_over_a_death(world: World, victim: Process | None) -> None:
    replay = call(world, "POST", "", {"state": "dead", "provider": "fal", "model": "m*"})
    assert (replay["matched"], replay["events"], replay["replayed"]) == (_MANY, _MANY, 0)
    call(world, "POST", f"/{replay['id']}/start")
    steps = "SELECT replayed FROM replays"
    eventually(lambda: world.rows(steps)[0][0], lambda pending: pending >= 200)
    victim = victim or holder(world)
    victim.kill()
    [(pending,)] = world.rows(steps)
    assert pending < _MANY
    # Exactly as many deliveries are in the new round as the replay counts.
    assert world.rows("SELECT count(*) FROM deliveries WHERE round = 1") == [(pending,)]

    let_leases_end(world, *victim.killed)
    world.revive()
    found = eventually(
        lambda: call(world, "GET", f"/{replay['id']}"),
        lambda found: found["state"] == "done",
        3 * PATIENCE,
    )
    assert found["replayed"] == _MANY
    assert world.rows("SELECT min(round), max(round), count(*) FROM deliveries") == [(1, 1, _MANY)]
    assert world.rows("SELECT DISTINCT replay_id FROM deliveries") == [(replay["id"],)]
    # The end is logged after its commit, which the test may see first.
    ended = eventually(
        lambda: [line["state"] for one in world.everyone for line in one.said("replay.ended")]
    )
    assert ended == ["done"]


def holder(world: World) -> Process:
    """Return the process that runs replays."""
    [(owner,)] = world.rows("SELECT owner FROM leases WHERE name = 'replays'")
    [found] = [one for one in world.servers if one.pid == owner.split(":")[-2]]
    return found


def call(world: World, method: str, path: str, body: Any = None) -> dict[str, Any]:
    """Call the last server; on PostgreSQL another server may run the replay."""
    url = f"{world.servers[-1].url}/v1/replays{path}"
    answer = world.http.request(method, url, json=body)
    assert answer.is_success, answer.text
    return dict(answer.json())
