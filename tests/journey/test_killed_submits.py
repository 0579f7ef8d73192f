"""A kill among submits leaves in doubt only what the provider may have."""

from __future__ import annotations

import socket
import sqlite3
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx

from receiver.emulator import settings_for
from tests.journey.parts import API_KEY, SECRETS, Process, eventually, free_port

_PREDICTIONS = 12
_READ = 3


def test_what_was_never_sent_is_queued_again_after_a_kill(tmp_path: Path) -> None:
    """The provider reads three submits and answers none; to all others it does not even connect."""
    # A queue of none holds one connection, which is made and never read.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as provider:
        read: list[socket.socket] = []
        bodies: list[bytes] = []

        def take() -> None:
            for _ in range(_READ):
                connection = provider.accept()[0]
                read.append(connection)
                bodies.append(connection.recv(65536))

        reader = threading.Thread(target=take)
        reader.start()
        database = tmp_path / "receiver.db"
        port = free_port()
        server = Process(
            ["-m", "receiver", "serve", "--port", str(port)],
            tmp_path / "serve.log",
            {
                **settings_for(f"http://127.0.0.1:{provider.getsockname()[1]}"),
                "FAL_KEY": "k",
                "FAL_MAX_IN_FLIGHT": "none",
                "RECEIVER_API_KEYS": API_KEY,
                "RECEIVER_SECRET_KEY": SECRETS[1],
                "RECEIVER_DATABASE_URL": f"sqlite:///{database}",
            },
            port,
        )
        server.start()

        def submit(number: int) -> None:
            body = {"provider": "fal", "model": "fal-ai/x", "input": {"prompt": str(number)}}
            auth = {"Authorization": f"Bearer {API_KEY}"}
            try:
                httpx.post(f"{server.url}/v1/predictions", json=body, headers=auth, timeout=60)
            except httpx.HTTPError:
                return  # it is killed under the request

        with ThreadPoolExecutor(_PREDICTIONS) as callers:
            for number in range(_PREDICTIONS):
                callers.submit(submit, number)
            eventually(lambda: len(bodies) == _READ and statuses(database)["submitting"])
            eventually(lambda: statuses(database)["submitting"] == _PREDICTIONS)
            server.kill()
        reader.join()
        for connection in read:
            connection.close()
    try:
        server.start()  # nobody is at the provider's any more
        found = statuses(database)
        assert found["queued"] + found["submitting"] >= _PREDICTIONS - _READ - 2
        assert _READ <= found["unconfirmed"] <= _READ + 2
    finally:
        server.kill()


def statuses(database: Path) -> Counter[str]:
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT status, count(*) FROM predictions GROUP BY status")
        return Counter(dict(rows.fetchall()))
