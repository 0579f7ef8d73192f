"""Through PgBouncer, as hosts put it before their servers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from receiver.model.errors import StoreUnusable
from receiver.store.inbox import accept_outcome
from receiver.store.postgres.engine import SCHEMA, PostgresStore
from receiver.store.postgres.queue import PgQueuerJobs
from tests.pgbouncer import pgbouncer
from tests.postgres import Database
from tests.store.parts import advisory_locks, arrival, new, settlement, wanted

pytestmark = pytest.mark.anyio

Pooler = Callable[[str], str]


@pytest.fixture
def pooler(bare_database: Database, tmp_path: Path) -> Iterator[Pooler]:
    """Give the URL of the bare database through a pooler in a mode."""
    with ExitStack() as stack:
        yield lambda mode: stack.enter_context(pgbouncer(tmp_path, bare_database, mode))


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
