"""The command line: run a receiver, or look at one that runs."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from receiver import client
from receiver.errors import ReceiverError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

main = typer.Typer(
    name="receiver",
    help="Submit predictions, record every outcome exactly once, run your handlers on it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_STOP: Final = 2
"""Seconds that open requests get to end when we stop; handlers get their own."""
_SWITCH: Final = 0.0005
"""Seconds between offers of the interpreter lock: the writing thread needs it often and briefly,
and at Python's 5 ms every one of its steps would wait that long behind a busy event loop."""

Handlers = Annotated[
    list[str] | None, typer.Argument(help="Files, modules or installed names (log, save, forward).")
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on.")]


@main.command()
def serve(
    handlers: Handlers = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    dev: Annotated[
        bool, typer.Option("--dev", help="Make up the secrets; let this machine in without a key.")
    ] = False,
) -> None:
    """Run the receiver: the API, the callbacks, and the handlers."""
    from receiver import logs
    from receiver.app import create_app
    from receiver.settings import Settings

    env = dict(os.environ) | ({"RECEIVER_DEV": "1"} if dev else {})
    if handlers:
        env["RECEIVER_HANDLERS"] = ",".join(handlers)
    try:
        settings = Settings.read(env)
        logs.configure(settings.log_format, settings.log_level)
        app = create_app(settings)
    except ReceiverError as error:
        _fail(error)
    sys.setswitchinterval(_SWITCH)
    run(app, host, port)


@main.command()
def emulate(
    host: Host = "127.0.0.1",
    port: Port = 8001,
    seconds: Annotated[float, typer.Option(help="How long a picture takes.")] = 0.8,
) -> None:
    """Serve Oxen.ai, Eachlabs and fal.ai on this machine, for tests and demos."""
    from receiver import logs
    from receiver.emulator import Options, create_emulator, settings_for

    logs.configure(None, "info")
    for name, value in settings_for(f"http://{host}:{port}").items():
        typer.echo(f"export {name}={value}")
    run(create_emulator(Options(generation=seconds)), host, port)


def run(app: ASGIApp, host: str, port: int) -> None:
    """Serve an app until SIGTERM or SIGINT, and end within seconds whatever handlers do."""
    import uvicorn

    uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_STOP,
            ws="none",
            lifespan="on",
        )
    ).run()


def _fail(error: ReceiverError) -> NoReturn:
    typer.secho(f"receiver: {error}", err=True, fg=typer.colors.RED)
    raise typer.Exit(1)


_ = threading, client
