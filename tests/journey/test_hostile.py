"""Harmful handlers: each attempt counts, whether the process survives it or is ended by it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.journey.hostile import DEADLY, ENDS_LOOPS, WAYS
from tests.journey.parts import HERE, Process, World, eventually, living, start_all
from tests.loopback import free_port
from tests.patience import PATIENCE
from tests.postgres import Database

pytestmark = pytest.mark.timeout(240)

_OTHERS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


@pytest.fixture(params=["sqlite", "postgres"])
def where(request: pytest.FixtureRequest) -> Database | None:
    if request.param == "sqlite":
        return None
    database: Database = request.getfixturevalue("bare_database")
    return database


def runner(world: World, database: Database | None, *, serves: bool = False) -> Process:
    """Start the process that runs the handlers: a worker beside the server, or the server."""
    if database is None or serves:
        process = hostile(world, "serve")
        world.servers.append(process)
    else:
        process = hostile(world, "worker")
        world.servers.append(hostile(world, "serve", "--no-dispatch"))
    start_all(world.retired)
    return process


def hostile(world: World, *command: str) -> Process:
    port = free_port() if command[0] == "serve" else None
    arguments = ["-m", "receiver", *command, str(HERE / "hostile.py")]
    arguments += [] if port is None else ["--port", str(port)]
    log = world.folder / f"{command[0]}.log"
    world.retired.append(process := Process(arguments, log, dict(world.env), port))
    return process


def ends(world: World, *names: str) -> dict[str, tuple[str, int]]:
    """Submit one prediction for each of these handlers; wait until all deliveries have ended."""
    for name in names:
        world.submit("fal", "a lighthouse [fast]", f"key-{name}", kind=name)
    return eventually(partial(deliveries, world, names), partial(are_over, names))


def are_over(names: Sequence[str], found: Mapping[str, tuple[str, int]]) -> bool:
    return len(found) == len(names) and all(
        state in {"dead", "done"} for state, _ in found.values()
    )


def deliveries(world: World, names: Sequence[str]) -> dict[str, tuple[str, int]]:
    schema = "" if world.database is None else "receiver."
    rows = world.rows(f"SELECT handler, state, attempts FROM {schema}deliveries")
    return {name: (state, attempts) for name, state, attempts in rows if name in names}


def revive(process: Process) -> None:
    if not process.is_alive:
        process.launch()


def noted(world: World, name: str) -> list[str]:
    return [note[1] for note in world.notes("hostile") if note[0] == name]


def test_harmful_handler_ends_only_its_own_attempts(tmp_path: Path, where: Database | None) -> None:
    with living(tmp_path, where, servers=()) as world:
        process = runner(world, where)
        found = ends(world, *(name for name in WAYS if name not in ENDS_LOOPS))
        for name in ENDS_LOOPS:
            found |= ends(world, name)
        assert found == dict.fromkeys(WAYS, ("dead", 2))
        assert process.is_alive, process.log.read_text()
        assert {note[2] for note in world.notes("hostile")} == {process.pid}
        # No connection has the number of a standard stream that a handler had closed.
        streams = [Path(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
        assert {str(stream.resolve()) for stream in streams} == {os.devnull}
        assert ends(world, "good") == {"good": ("done", 1)}
        # SIGTERM works, although a handler had disabled it and another handler is stuck.
        stuck = "seize" if where is None else "block"
        world.submit("fal", "a lighthouse [fast]", "stuck", kind=stuck)
        (world.folder / "may_hang").touch()
        eventually(partial(noted, world, stuck))
        process.send(signal.SIGTERM)
        assert process.running is not None
        process.running.wait(PATIENCE)


def test_deliveries_that_kill_their_process_become_dead(tmp_path: Path) -> None:
    with living(tmp_path, servers=()) as world:
        process = runner(world, None)
        world.submit("fal", "a lighthouse [fast]", "deadly", kind="deadly")
        names = tuple(DEADLY)

        def look() -> dict[str, tuple[str, int]]:
            revive(process)
            return deliveries(world, names)

        found = eventually(look, partial(are_over, names), 2 * PATIENCE)
        assert {state for state, _ in found.values()} == {"dead"}
        revive(process)
        assert ends(world, "good") == {"good": ("done", 1)}


def test_surviving_child_processes_hold_no_port_database_or_client(
    tmp_path: Path, where: Database | None
) -> None:
    with living(tmp_path, where, servers=()) as world, ExitStack() as left:
        process = runner(world, where, serves=True)
        client = left.enter_context(socket.create_connection(("127.0.0.1", process.port or 0)))
        client.settimeout(PATIENCE)
        client.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert ends(world, "outlived") == {"outlived": ("done", 1)}
        children = noted(world, "child")
        for child in children:
            left.callback(os.kill, int(child), signal.SIGKILL)
        process.kill()
        with suppress(ConnectionResetError):
            assert client.recv(1) == b""
        if where is not None:
            eventually(lambda: where.rows(_OTHERS), lambda rows: rows == [(0,)])
        process.start()
        assert ends(world, "good") == {"good": ("done", 1)}
        for child in children:
            os.kill(int(child), 0)  # raises if the child has ended
