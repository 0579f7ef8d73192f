"""PgBouncer for the tests, as hosting services run it before PostgreSQL."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Final
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.loopback import free_port
from tests.patience import PATIENCE
from tests.postgres import Database

_PLACES: Final = "/usr/sbin:/usr/bin:/usr/local/bin"
_FORGETS: Final = (1, 21)
"""The first release that can track the prepared statements of clients."""


def _binary() -> str | None:
    return os.environ.get("TEST_PGBOUNCER") or shutil.which("pgbouncer", path=_PLACES)


@cache
def variants() -> list[dict[str, str]]:
    """Return the settings to test: with and without prepared statements, if both are possible."""
    binary = _binary()
    said = subprocess.check_output([binary, "--version"], text=True) if binary else ""
    found = re.search(r"(\d+)\.(\d+)", said)
    can_forget = found is not None and (int(found[1]), int(found[2])) >= _FORGETS
    return [{}, {"max_prepared_statements": "0"}] if can_forget else [{}]


@contextmanager
def pgbouncer(
    folder: Path,
    database: Database,
    mode: str = "transaction",
    more: Mapping[str, str] = MappingProxyType({}),
    connect_query: str = "SELECT 1",
) -> Iterator[str]:
    """Run PgBouncer in a pool mode, and yield the URL of the database through it."""
    binary = _binary()
    if binary is None:
        pytest.skip("pgbouncer is not installed")
    port = free_port()
    parts = urlsplit(database.url)
    host = parts.hostname or parse_qs(parts.query)["host"][0]
    secret = f" password={parts.password}" if parts.password else ""
    # PgBouncer refuses to run as root; the user of PostgreSQL may use its socket.
    as_user = {"user": Path(host).owner()} if os.geteuid() == 0 and host[0] == "/" else {}
    wanted = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "auth_type": "any",
        "unix_socket_dir": "",
        "pool_mode": mode,
        "default_pool_size": 30,
        **as_user,
        **more,
    }
    settings = folder / f"{mode}-{port}.ini"
    settings.write_text(
        f"[databases]\n{database.name} = host={host} port={parts.port or 5432} "
        f"user={parts.username}{secret} connect_query='{connect_query}'\n[pgbouncer]\n"
        + "".join(f"{name} = {value}\n" for name, value in wanted.items())
    )
    settings.chmod(0o644)
    with (
        settings.with_suffix(".log").open("w") as said,
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
