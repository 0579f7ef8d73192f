"""Commands that run something: the receiver, its parts, or an emulator to try it with."""

from __future__ import annotations

import os
from typing import Annotated, Final, Literal

import typer

from receiver.asgi import import_app
from receiver.cli import serving
from receiver.cli.output import print_line, print_plainly
from receiver.cli.program import failing, main, panel
from receiver.cli.words import Dev, Handlers

command = panel("Run")

_PICTURE: Final = "Seconds that a picture takes."


@command()
def init(
    folder: Annotated[str, typer.Argument(help="The folder; by default this one.")] = ".",
) -> None:
    """Write a project to start from: a handler, its test, .env with secrets, compose.yaml.

    Files that exist already are not changed.
    """
    from receiver.cli.init import init

    with failing(OSError):
        init(folder)


@command(epilog="Settings are environment variables; `receiver settings` lists them.")
def serve(
    handlers: Handlers = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on; default: HOST, else 127.0.0.1 (0.0.0.0 if PORT is set).",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            help="Port to listen on; default: PORT, else 8000.",
            min=0,
            max=65535,
            show_default=False,
        ),
    ] = None,
    dev: Dev = False,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="Use emulated providers; includes --dev.")
    ] = False,
    tries: Annotated[
        bool, typer.Option("--try", help="Submit a first prediction to each provider.")
    ] = False,
    reloads: Annotated[
        bool | None,
        typer.Option(
            "--reload/--no-reload",
            help="Reload handlers and recipes when their files change; on with --dev.",
            show_default=False,
        ),
    ] = None,
    no_dispatch: Annotated[
        bool,
        typer.Option(
            "--no-dispatch", help="Do not run handlers: `receiver worker` or `drain` does."
        ),
    ] = False,
) -> None:
    """Run the receiver: the API, the callbacks, and the handlers.

    On your own machine begin with `receiver serve --emulate my_handlers.py`: it needs no settings
    and calls no real provider. With --dev, `.env` of this folder is read too; the environment takes
    precedence.
    """
    if not (dev or emulate or reloads):
        if tries:
            raise typer.BadParameter("--try goes with --emulate or --dev")
        serving.serve(handlers or (), host, port, not no_dispatch)
        return
    import_app()
    from receiver.cli import dev as development
    from receiver.cli import environment
    from receiver.settings import Listening

    environment.read_env_file(dev=dev or emulate)
    where = Listening.read(os.environ, host, port, dev=dev or emulate)
    development.serve(
        handlers or (),
        where.host,
        where.port,
        dispatch=not no_dispatch,
        dev=dev,
        emulate=emulate,
        reloads=reloads is not False and not no_dispatch,
        tries=tries,
    )


@command()
def worker(handlers: Handlers = None, dev: Dev = False) -> None:
    """Run handlers only, beside `receiver serve` on the same PostgreSQL."""
    import uvloop

    import_app()
    from receiver.app import work
    from receiver.cli.environment import settings
    from receiver.http.stopping import LINGER, exit_after, run, stop_signal

    given = settings(handlers, dev=dev)

    async def working() -> None:
        async with stop_signal() as stop:
            await work(given, stop)
        exit_after(LINGER, 0)

    serving.tune_garbage_collection()
    run(working(), uvloop.new_event_loop())


@command()
def drain(
    handlers: Handlers = None,
    seconds: Annotated[float, typer.Option(help="Stop after this many seconds.", min=1)] = 25.0,
    dev: Dev = False,
) -> None:
    """Run due deliveries, submits and polls, then exit: for cron."""
    import asyncio

    import_app()
    from receiver.app import drain
    from receiver.cli.environment import settings
    from receiver.http.stopping import LINGER, exit_after, run, stop_signal

    given = settings(handlers, dev=dev)

    async def draining() -> None:
        async with stop_signal() as stop:
            print_plainly(await drain(given, seconds, stop))
        exit_after(LINGER, 0)

    run(draining(), asyncio.new_event_loop())


@command()
def migrate(dev: Dev = False) -> None:
    """Bring the database's schema up to date; `serve` and `worker` do so at their start."""
    import asyncio

    import_app()
    from receiver.app import migrate
    from receiver.cli.environment import settings

    given = settings(dev=dev)
    asyncio.run(migrate(given))
    print_line(f"{given.database} is up to date")


@command()
def emulate(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8001,
    seconds: Annotated[float, typer.Option(help=_PICTURE, min=0)] = 0.8,
    shape: Annotated[
        Literal["new", "old", "mixed"], typer.Option(help="Format of the providers' answers.")
    ] = "mixed",
    receiver: Annotated[
        str, typer.Option(help="The address of the receiver that chat platforms call.")
    ] = "http://127.0.0.1:8000",
) -> None:
    """Serve emulated providers, Slack, Discord and Telegram, for tests and demos.

    It prints the settings with which a receiver uses them (`serve --emulate` sets them itself).
    `receiver chat` opens a chat. A word in a prompt decides what happens to its prediction:

    - [fail] the model fails; [timeout] it runs out of time
    - [moderated] the content policy stops it
    - [refuse] the submit is refused, as the balance is used up
    - [slow] it takes ten times as long; [fast] it takes no time; [never] it never ends
    - [text] the model answers in words
    - [lose_callback] no callback is sent; [repeat_callback] it is sent three times
    - [delay_callback] it is sent late; [early_callback] it is sent before the submit is answered
    - [refuse_submit] HTTP 503; [drop_submit] no answer; [stall_submit] no answer, but billed
    - [lock_account] fal has locked the account
    - [reserve_money] Eachlabs refuses a submit while another prediction runs
    - [break_poll] every poll fails; [large_output] pictures come as data URIs
    - [wrong_signature] and [stale_timestamp] the callback's signature is wrong or too old
    """
    from receiver.cli.emulating import emulate
    from receiver.emulator import Options

    emulate(host, port, Options(generation=seconds, shape=shape), receiver.rstrip("/"))


@command()
def demo(
    folder: Annotated[str | None, typer.Option(help="Where to save the pictures.")] = None,
    seconds: Annotated[float, typer.Option(help=_PICTURE, min=0)] = 1.5,
) -> None:
    """Show on one screen how a receiver works: emulated providers, outcomes, handlers."""
    from receiver.cli.demo import run

    with failing(OSError):
        code = run(folder, seconds)
    raise typer.Exit(code)


chat = typer.Typer()
"""`receiver chat` opens a chat in the terminal; its subcommands set up chat platforms."""
main.add_typer(chat, name="chat", rich_help_panel="Run")


@chat.callback(invoke_without_command=True)
def chat_terminal(
    ctx: typer.Context,
    platform: Annotated[
        Literal["slack", "discord", "telegram"],
        typer.Option("--as", help="The platform to emulate."),
    ] = "slack",
    person: Annotated[str, typer.Option(help="Your id there.")] = "U1",
    place: Annotated[str, typer.Option(help="The channel; D is a direct message.")] = "C1",
    emulator: Annotated[
        str, typer.Option(help="The emulator's address, as `serve --emulate` prints it.")
    ] = "http://127.0.0.1:8001",
    linger: Annotated[
        float,
        typer.Option(
            help="After the end of piped input: exit after this many seconds without a message."
        ),
    ] = 5.0,
) -> None:
    """Chat with the handlers of a `receiver serve --emulate`, as on Slack, Discord or Telegram.

    Type `/imagine a lighthouse`; a number presses the button with that number; Ctrl-D exits.
    """
    if ctx.invoked_subcommand is not None:
        return
    from receiver.cli.terminal import Terminal

    Terminal(emulator.rstrip("/"), platform, person, place).run(linger)


@chat.command("slack")
def chat_slack(
    name: Annotated[str, typer.Option(help="The name of the app, and of its bot.")] = "imagine",
    dev: Dev = False,
) -> None:
    """Print the manifest of an app in Slack: a command for each recipe, at RECEIVER_PUBLIC_URL."""
    from receiver.cli.chats import show_manifest

    typer.echo(show_manifest(name, dev=dev))


@chat.command("discord")
def chat_discord(
    guild: Annotated[
        str,
        typer.Option(
            help="The id of a server: register only there, effective at once. Default: all servers."
        ),
    ] = "",
    dev: Dev = False,
) -> None:
    """Register each recipe as a command in Discord; all earlier commands are replaced."""
    from receiver.cli.chats import register_in_discord

    typer.echo(register_in_discord(guild, dev=dev))


@chat.command("telegram")
def chat_telegram(
    poll: Annotated[
        bool, typer.Option("--poll", help="Remove the webhook, for TELEGRAM_POLL=1.")
    ] = False,
    dev: Dev = False,
) -> None:
    """Set Telegram's webhook and menu of commands."""
    from receiver.cli.chats import set_telegram_up

    typer.echo(set_telegram_up(poll=poll, dev=dev))
