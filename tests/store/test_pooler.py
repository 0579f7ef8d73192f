"""Through PgBouncer, as hosts put it before their servers."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from receiver.model.errors import StoreUnusable
from receiver.store.inbox import accept_outcome
from receiver.store.postgres.engine import SCHEMA, PostgresStore
from receiver.store.postgres.queue import PgQueuerJobs
from tests.patience import PATIENCE
from tests.postgres import Database
from tests.store.parts import advisory_locks, arrival, new, settlement, wanted

pytestmark = pytest.mark.anyio

Pooler = Callable[[str], str]


@contextmanager
def pgbouncer(binary: str, folder: Path, database: Database, mode: str) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    parts = urlsplit(database.url)
    host = parts.hostname or parse_qs(parts.query)["host"][0]
    secret = f" password={parts.password}" if parts.password else ""
    # Root it refuses to be; the server's user may reach its socket.
    as_user = f"user = {Path(host).owner()}" if os.geteuid() == 0 and host[0] == "/" else ""
    settings = folder / f"{mode}.ini"
    settings.write_text(
        f"[databases]\n{database.name} = host={host} port={parts.port or 5432} "
        f"user={parts.username}{secret}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = any\n"
        f"unix_socket_dir =\npool_mode = {mode}\ndefault_pool_size = 30\n"
        f"{as_user}\n"
    )
    settings.chmod(0o644)
    with (
        (folder / "log").open("w") as said,
        subprocess.Popen([binary, str(settings)], stderr=said) as process,
    ):
        try:
            ends = time.monotonic() + PATIENCE
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < ends
                    assert process.poll() is None
                    time.sleep(0.02)
            yield f"postgresql://me@127.0.0.1:{port}/{database.name}"
        finally:
            process.terminate()


@pytest.fixture
def pooler(bare_database: Database, tmp_path: Path) -> Iterator[Pooler]:
    """Give the URL of the bare database through a pooler in a mode."""
    binary = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if binary is None:
        pytest.skip("pgbouncer is not installed")
    with ExitStack() as stack:
        yield lambda mode: stack.enter_context(pgbouncer(binary, tmp_path, bare_database, mode))


def made(url: str) -> PostgresStore:
    return PostgresStore(url, print, PgQueuerJobs(SCHEMA))


async def test_in_session_mode_everything_works(bare_database: Database, pooler: Pooler) -> None:
    url = pooler("session")
    await made(url).migrate()
    places = bare_database.rows(
        "SELECT DISTINCT schemaname FROM pg_tables WHERE schemaname IN ('public', 'receiver')"
    )
    assert places == [("receiver",)]
    for _ in range(2):  # whoever comes second is given sessions that were used before
        stores = [made(url), made(url)]
        await asyncio.gather(*(store.start() for store in stores))
        number = bare_database.rows("SELECT count(*) FROM predictions")[0][0]
        await stores[0].predictions.create(new(number))
        await accept_outcome(stores[1], arrival(number, handlers=("greet",)))
        [claim] = (await stores[0].claim(wanted())).claims
        assert await stores[0].settle(settlement(claim))
        await asyncio.gather(*(store.stop() for store in stores))


async def test_transaction_mode_is_refused_and_nothing_stays_behind(
    bare_database: Database, pooler: Pooler
) -> None:
    url = pooler("transaction")
    for begins in (made(url).migrate, made(url).start):
        with pytest.raises(StoreUnusable, match="a pooler in transaction mode"):
            await begins()
    assert advisory_locks(bare_database) == 0
    await made(bare_database.url).migrate()
