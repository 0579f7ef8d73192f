"""The server of `receiver serve` without the options for development."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Sequence
from typing import Final

from receiver.asgi import import_app

_SWITCH: Final = 0.0005
"""Seconds after which a busy thread offers the interpreter lock: the writing thread needs it often
and briefly, and with Python's 5 ms each of its steps would wait that long for the event loop."""
_COLLECT: Final = 10_000
"""New objects between two collections of the youngest generation; 700 suits small programs."""


def serve(handlers: Sequence[str], host: str | None, port: int | None, dispatch: bool) -> None:
    """Serve until a signal arrives; raise ReceiverError if the server cannot start."""
    import_app()
    from receiver.app import create_app, migrate
    from receiver.cli import environment
    from receiver.http.listening import listening
    from receiver.http.server import Server
    from receiver.settings import Listening

    where = Listening.read(os.environ, host, port)
    settings = environment.settings(handlers, dev=False)
    with listening(where.host, where.port) as sockets:
        app = create_app(settings, dispatch=dispatch)
        if settings.mode != "serverless":  # there the deployment migrates
            asyncio.run(migrate(settings))
        sys.setswitchinterval(_SWITCH)
        tune_garbage_collection()
        Server(app, where.host, where.port).run(sockets)


def tune_garbage_collection() -> None:
    """Exclude the objects made so far from garbage collection, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT, 20, 20)
