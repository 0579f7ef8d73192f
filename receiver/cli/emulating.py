"""Emulated providers from the command line: by themselves, or beside a receiver for development."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import msgspec
import typer
from starlette.applications import Starlette

from receiver.emulator import Options, create_emulator, settings_for
from receiver.http.listening import listening, url_of
from receiver.http.server import Server
from receiver.model.errors import ReceiverError
from receiver.observability import logging as logs
from receiver.settings import tls

_RECEIVER: Final = "http://127.0.0.1:8000"
_LONGEST_START: Final = 10.0


def emulate(host: str, port: int, seconds: float, shape: str) -> None:
    """Serve the providers until a signal comes; print what a receiver needs to use them."""
    tls.require(os.environ)
    options = msgspec.convert({"generation": seconds, "shape": shape}, Options)
    logs.configure(None, "info")
    with listening(host, port) as sockets:
        for name, value in environment(url_of(sockets[0]), _RECEIVER).items():
            typer.echo(f"export {name}={value}")
        typer.echo("# the words for prompts are in `receiver emulate --help`: [fail], [slow], …")
        Server(create_emulator(options), host, port).run(sockets)


def environment(providers: str, receiver: str) -> dict[str, str]:
    """Return the settings of a receiver among emulated providers; any key will do there."""
    return {
        **dict.fromkeys(("OXEN_API_KEY", "EACHLABS_API_KEY", "FAL_KEY"), "emulated"),
        "RECEIVER_PUBLIC_URL": receiver,
        "RECEIVER_ALLOW_PRIVATE_FETCH": "1",  # their pictures are on this machine
        **settings_for(providers),
    }


@contextmanager
def emulated(seconds: float) -> Iterator[str]:
    """Emulate providers on a port that is free until the block is left; give their address."""
    with (
        listening("127.0.0.1", 0) as sockets,
        served(create_emulator(Options(generation=seconds)), sockets) as url,
    ):
        yield url


@contextmanager
def served(app: Starlette, sockets: list[socket.socket]) -> Iterator[str]:
    """Serve an app from a thread of its own; give its address once it has started."""
    url = url_of(sockets[0])
    server = Server(app, "127.0.0.1", 0, leave=False)
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    waited = 0.0
    while not server.started:
        if not thread.is_alive() or waited > _LONGEST_START:
            raise ReceiverError("a server in this process did not start")
        threading.Event().wait(0.01)
        waited += 0.01
    try:
        yield url
    finally:
        server.should_exit = True
        thread.join(_LONGEST_START)
