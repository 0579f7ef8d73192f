"""After a kill, only submits that the provider may have received are unconfirmed."""

from __future__ import annotations

import socket
import sqlite3
import ssl
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import httpx

from receiver.emulator import settings_for
from tests.emulator.parts import write_certificate
from tests.journey.parts import API_KEY, SECRETS, Process, eventually
from tests.loopback import free_port

_PREDICTIONS = 12
_READ = 3


def test_submits_that_were_never_sent_are_queued_again_after_a_kill(tmp_path: Path) -> None:
    """The provider reads three submits and answers none; the others get no TLS handshake."""
    certificate, key = write_certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    held: list[socket.socket] = []
    bodies: list[bytes] = []

    def provide() -> None:
        with suppress(OSError):  # until the listener is closed
            while True:
                connection = provider.accept()[0]
                held.append(connection)
                if len(bodies) < _READ:
                    held.append(connection := tls.wrap_socket(connection, server_side=True))
                    got = connection.recv(65536)
                    while got.startswith(b"POST") and b'"prompt"' not in got:
                        got += connection.recv(65536)  # the body comes after the head
                    # GET: the receiver also requests fal's public keys.
                    bodies.extend([got] * got.startswith(b"POST"))

    with socket.create_server(("127.0.0.1", 0), backlog=64) as provider:
        reader = threading.Thread(target=provide)
        reader.start()
        database = tmp_path / "receiver.db"
        port = free_port()
        server = Process(
            ["-m", "receiver", "serve", "--port", str(port)],
            tmp_path / "serve.log",
            {
                **settings_for(f"https://127.0.0.1:{provider.getsockname()[1]}"),
                "SSL_CERT_FILE": str(certificate),
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
                httpx.post(
                    f"{server.url}/v1/predictions",
                    json=body,
                    headers=auth,
                    timeout=60,
                    verify=False,
                )
            except httpx.HTTPError:
                return  # the server is killed during the request

        with ThreadPoolExecutor(_PREDICTIONS) as callers:
            for number in range(_PREDICTIONS):
                callers.submit(submit, number)
            eventually(lambda: len(bodies) == _READ)
            eventually(lambda: statuses(database).total() == _PREDICTIONS)
            server.kill()
        provider.shutdown(socket.SHUT_RDWR)
        reader.join()
        for connection in held:
            connection.close()
    try:
        server.start()  # the provider is down now
        found = statuses(database)
        assert found["unconfirmed"] == _READ
        assert found["queued"] + found["submitting"] == _PREDICTIONS - _READ
    finally:
        server.kill()


def statuses(database: Path) -> Counter[str]:
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT status, count(*) FROM predictions GROUP BY status")
        return Counter(dict(rows.fetchall()))
