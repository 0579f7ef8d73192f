"""Emulated providers and chat platforms: alone, or beside a receiver in development."""

from __future__ import annotations

import os
import shlex
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Final

import msgspec
import typer
from starlette.applications import Starlette

from receiver.emulator import Options, chat_settings_for, create_emulator, settings_for
from receiver.http.listening import listening, url_of
from receiver.http.server import Server
from receiver.model.errors import ReceiverError
from receiver.observability import logging as logs
from receiver.providers import DECLARED
from receiver.settings import tls

RECEIVER: Final = "http://127.0.0.1:8000"
EMULATOR: Final = "http://127.0.0.1:8001"
"""The address of the emulator beside a receiver at its default port."""
_PORT: Final = 8001
_LONGEST_START: Final = 10.0


def emulate(host: str, port: int, options: Options, receiver: str) -> None:
    """Serve the emulator until a signal arrives; print the settings of a receiver that uses it."""
    tls.require(os.environ)
    logs.configure(None, "info")
    with listening(host, port) as sockets:
        url = url_of(sockets[0])
        for name, value in {**environment(url, receiver), **chat_settings_for(url)}.items():
            typer.echo(f"export {name}={shlex.quote(value)}")
        typer.echo("# the words for prompts are in `receiver emulate --help`: [fail], [slow], …")
        typer.echo(f"# chat: receiver chat --emulator {url}")
        options = msgspec.structs.replace(options, receiver=receiver, own=url)
        Server(create_emulator(options), host, port).run(sockets)


def environment(providers: str, receiver: str) -> dict[str, str]:
    """Return the settings of a receiver with emulated providers, which accept any key."""
    return {
        **{declared.key: "emulated" for declared in DECLARED.values()},
        "RECEIVER_PUBLIC_URL": receiver,
        "RECEIVER_ALLOW_PRIVATE_FETCH": "1",  # their pictures are on this machine
        **settings_for(providers),
    }


def chats_of(emulator: str, env: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of emulated chat platforms, but not of those with an account in `env`."""
    given = {name.partition("_")[0] for name in env if name.endswith(("_TOKEN", "_WEBHOOK"))}
    # The emulated Telegram has no webhook set, so updates are polled.
    found = {**chat_settings_for(emulator), "TELEGRAM_POLL": "1"}.items()
    return {name: value for name, value in found if name.partition("_")[0] not in given}


@contextmanager
def emulated(seconds: float, receiver: str) -> Iterator[str]:
    """Serve the emulator on a free port until the block is left; yield its address.

    For a receiver at its default port it is 8001 if that is free: the default of `receiver chat`.
    """
    with ExitStack() as stack:
        port = _PORT if receiver == RECEIVER else 0
        try:
            sockets = stack.enter_context(listening("127.0.0.1", port))
        except ReceiverError:  # the port is in use
            sockets = stack.enter_context(listening("127.0.0.1", 0))
        own = url_of(sockets[0])
        options = Options(generation=seconds, receiver=receiver, own=own)
        yield stack.enter_context(served(create_emulator(options), sockets))


@contextmanager
def served(app: Starlette, sockets: list[socket.socket]) -> Iterator[str]:
    """Serve an app from a thread of its own; yield its address once it has started."""
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
