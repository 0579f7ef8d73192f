"""Connections to PostgreSQL: direct, or through a pooler in transaction mode.

Such a pooler (PgBouncer's and Supavisor's transaction mode, Neon's `-pooler` hosts) gives each
transaction another session. So nothing is set for longer than a transaction, no statement is
prepared for longer than its use, and notices are not received.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import asyncpg
import msgspec

from receiver.model.errors import StoreUnusable
from receiver.store.postgres import address
from receiver.store.postgres.group_commit import Connection

DATABASE_URL: Final = "RECEIVER_DATABASE_URL"
MIGRATE_URL: Final = "RECEIVER_MIGRATE_URL"
Pooled: TypeAlias = Literal["auto", "on", "off"]

CONNECT_TIMEOUT: Final = 5.0
COMMAND_TIMEOUT: Final = 10.0
_OF_A_TRANSACTION: Final = {
    # A process that is frozen in a transaction must not keep its rows locked.
    "idle_in_transaction_session_timeout": "10000",
    "lock_timeout": "8000",
    # All statements here are short, and their plans must not depend on the tables' statistics.
    "jit": "off",
    "enable_seqscan": "off",
    # Else queued and in-flight predictions are searched along the primary key, past all others.
    "random_page_cost": "1.1",
    "max_parallel_workers_per_gather": "0",
}
_OF_A_SESSION: Final = {
    "search_path": "receiver",
    **_OF_A_TRANSACTION,
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
}
_OF_A_PROXY: Final = re.compile(r"(endpoint|project|reference)=")
"""The values in `options` that Neon's and Supabase's proxies read and do not pass on."""
_BACKEND: Final = "SELECT pg_backend_pid() -- {}"
_LAST_RUN: Final = "SELECT query FROM pg_stat_activity WHERE pid = $1::int"
_UNKNOWN: Final = ("<insufficient privilege>", "", None)
_LOOKS: Final = 5
"""Number of checks, as one alone may miss a pooler by chance."""
_REFUSED: Final = "unsupported startup parameter"
"""PgBouncer's error for settings in a start-up message."""
_POOLED: Final = (
    "the database is behind a pooler in transaction mode, which gives each transaction another "
    "session, and RECEIVER_DATABASE_POOLED is off; set that to auto, or RECEIVER_DATABASE_URL to "
    "the server itself or to a pooler in session mode"
)


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """How a store may use its server."""

    pooled: Pooled = "auto"
    migrate_url: str | None = None
    """The URL for setting up the schema, if it is another one for the same database."""
    serverless: bool = False
    """Whether to connect only when needed, and to leave the schema to `receiver migrate`."""
    connections: int = 9
    """The most connections at a time."""


class Sessions:
    """Makes the connections to one URL."""

    def __init__(self, url: str, access: Access, name: str = DATABASE_URL) -> None:
        self._url = url
        self.name = name
        """The setting that gives the URL."""
        self._access = access
        self._is_found = False
        """Whether a check found a pooler that neither the URL nor a setting shows."""

    @cached_property
    def address(self) -> address.Address:
        return address.read(self._url)

    @property
    def is_pooled(self) -> bool:
        """Whether each transaction may get another session."""
        if self._access.pooled != "auto":
            return self._access.pooled == "on"
        # Functions need a pooler sooner or later, and need no more than a pooler offers.
        return self._access.serverless or self.address.is_pooled or self._is_found

    @property
    def timeout(self) -> float:
        """Seconds that connecting may take."""
        return self.address.timeout or CONNECT_TIMEOUT

    @property
    def where(self) -> dict[str, Any]:
        """Arguments of asyncpg's connect; poolers refuse most settings in a start-up message."""
        startup = dict(self.address.startup)
        if self.is_pooled and not _OF_A_PROXY.match(startup.get("options", "")):
            startup.pop("options", None)
        return {
            "dsn": self.address.dsn,
            "ssl": self.address.context,
            "timeout": self.timeout,
            "command_timeout": COMMAND_TIMEOUT,
            "server_settings": startup,
            **({"statement_cache_size": 0} if self.is_pooled else {}),
        }

    @property
    def begin(self) -> str:
        """The statement that begins a transaction; behind a pooler, with its settings."""
        if not self.is_pooled:
            return "BEGIN"
        wanted = {**self.address.settings, **_OF_A_TRANSACTION}
        return f"BEGIN; {address.set_config(wanted, is_local=True)}"

    async def connect(self, **settings: str) -> Connection:
        """Open a connection with our settings."""
        connection = await self.open(**self.where)
        try:
            await self.prepare(connection, **settings)
        except BaseException:
            connection.terminate()
            raise
        return connection

    async def open(self, *given: Any, **named: Any) -> Connection:
        """Open a connection by asyncpg, with its arguments."""
        with self._in_words():
            connection: Connection = await asyncpg.connect(*given, **named)
        return connection

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        """Explain a timeout: a pooler accepts connections for which it has no session yet."""
        try:
            yield
        except TimeoutError as error:
            raise TimeoutError(
                "no session was given: the server does not answer, or a pooler before it has fewer "
                f"sessions than RECEIVER_DATABASE_CONNECTIONS ({self._access.connections})"
            ) from error

    async def prepare(self, connection: Connection, **settings: str) -> None:
        """Set our common settings, and `settings`, for the session; not behind a pooler."""
        if not self.is_pooled:
            wanted = {**self.address.settings, **_OF_A_SESSION, **settings}
            with self._in_words():
                await connection.execute(address.set_config(wanted, is_local=False))

    async def connect_first(self) -> Connection:
        """Open a connection with the server's own settings, and find out if there is a pooler.

        Raises StoreUnusable: there is one in transaction mode, and `pooled` is off.
        """
        try:
            connection = await self._connect_bare()
        except asyncpg.ProtocolViolationError as error:
            if self.is_pooled or _REFUSED not in str(error):
                raise
            self._find()
            return await self._connect_bare()
        try:
            if not self.is_pooled and await self._is_shared(connection):
                self._find()
        except BaseException:
            await close(connection)
            raise
        return connection

    def _find(self) -> None:
        if self._access.pooled == "off":
            raise StoreUnusable(_POOLED)
        self._is_found = True

    async def _connect_bare(self) -> Connection:
        # A kept statement would stay in a session that another client gets next.
        return await self.open(**{**self.where, "statement_cache_size": 0})

    async def _is_shared(self, first: Connection) -> bool:
        """Return whether sessions are given to several clients in turn; leave no trace there."""
        # A pooler gives clients its own process numbers, which they use to cancel.
        if first.get_server_pid() == await first.fetchval(_BACKEND.format("first")):
            return False
        second = await self._connect_bare()
        try:
            for _ in range(_LOOKS):
                if await _has_moved(first, second):
                    return True
        finally:
            await close(second)
        return False


async def _has_moved(first: Connection, second: Connection) -> bool:
    """Return whether another client has used the first's session, or the first another session.

    A pooler in transaction mode gives a second client the session that the first has just used, or
    gives the first another while the second is in a transaction. With many clients neither may
    happen, so we also check which statement was last run in that session.
    """
    statement = _BACKEND.format(secrets.token_hex(4))
    before = await first.fetchval(statement)
    async with second.transaction():
        if before == await second.fetchval(_BACKEND.format("second")):
            return True  # it may be the only session
        ran = await second.fetchval(_LAST_RUN, before)
        after = await first.fetchval(_BACKEND.format("first"))
    return before != after or ran not in {statement, *_UNKNOWN}


async def close(connection: Connection) -> None:
    """Close a connection; a server that closes slowly must not delay our start."""
    with contextlib.suppress(TimeoutError):
        await connection.close(timeout=1.0)
