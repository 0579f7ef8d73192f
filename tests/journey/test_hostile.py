"""Whatever a handler's code does, its attempt counts, and the process lives on or is gone."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest

from tests.journey.hostile import WAYS
from tests.journey.parts import HERE, Process, World, eventually, free_port, living
from tests.patience import PATIENCE
from tests.postgres import Database

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(params=["sqlite", "postgres"])
def where(request: pytest.FixtureRequest) -> Database | None:
    if request.param == "sqlite":
        return None
    database: Database = request.getfixturevalue("bare_database")
    return database


def runner(world: World, database: Database | None) -> Process:
    """Make the process that runs the handlers: a worker beside the server, or the server itself."""
    hostile = str(HERE / "hostile.py")
    if database is None:
        process = Process(
            ["-m", "receiver", "serve", hostile, "--port", str(port := free_port())],
            world.folder / "hostile.log",
            dict(world.env),
            port,
        )
    else:
        process = Process(
            ["-m", "receiver", "worker", hostile], world.folder / "hostile.log", dict(world.env)
        )
        server = Process(
            [
                "-m",
                "receiver",
                "serve",
                "--no-dispatch",
                hostile,
                "--port",
                str(port := free_port()),
            ],
            world.folder / "server.log",
            dict(world.env),
            port,
        )
        world.retired.append(server)
        world.servers.append(server)
        server.start()
    world.servers.extend([process] if database is None else [])
    world.retired.append(process)
    process.start()
    return process


def delivery(world: World, handler: str) -> tuple[str, int]:
    schema = "" if world.database is None else "receiver."
    found = world.rows(
        f"SELECT state, attempts FROM {schema}deliveries WHERE handler = '{handler}'"
    )
    return (found[0][0], found[0][1]) if found else ("", 0)


def test_a_hostile_handler_ends_its_own_attempts_only(
    tmp_path: Path, where: Database | None
) -> None:
    with living(tmp_path, where, servers=()) as world:
        process = runner(world, where)
        for number, name in enumerate(WAYS):
            world.submit("fal", "a lighthouse", f"key-{number}", kind=name)
            eventually(partial(delivery, world, name), lambda found: found[0] in {"dead", "done"})
        found = {name: delivery(world, name) for name in WAYS}
        assert found == dict.fromkeys(WAYS, ("dead", 2))
        assert process.is_alive, process.log.read_text()
        assert {note[2] for note in world.notes("hostile")} == {process.pid}
        world.submit("fal", "a lighthouse", "good", kind="good")
        eventually(lambda: delivery(world, "good")[0] == "done")
        # The signals that a handler took are ours again, and a stuck loop does not hold them up.
        world.submit("fal", "a lighthouse", "block", kind="block")
        eventually(lambda: any(note[0] == "block" for note in world.notes("hostile")))
        process.send(signal.SIGTERM)
        assert process.running is not None
        process.running.wait(PATIENCE)


def test_a_delivery_that_ends_every_process_ends_dead(tmp_path: Path) -> None:
    with living(tmp_path, servers=()) as world:
        process = runner(world, None)
        world.submit("fal", "a lighthouse", "dies", kind="dies")
        for _ in range(3):
            eventually(lambda: not process.is_alive)
            process.launch()
        eventually(lambda: delivery(world, "dies")[0] == "dead")
        assert process.is_alive
