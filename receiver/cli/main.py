"""The command line: run a receiver, or look at one that runs."""

from __future__ import annotations

import gc
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from io import TextIOWrapper
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NoReturn, TypeVar

import typer
from typer.models import CommandInfo

from receiver.cli.output import print_plainly, print_value, say
from receiver.model.errors import HandlerError, ReceiverError, SettingsError
from receiver.model.text import spelled

if TYPE_CHECKING:
    from receiver.cli.client import Client
    from receiver.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])


PANELS: Final = {
    "Run": ("init", "serve", "worker", "drain", "migrate", "emulate", "demo"),
    "Predict": ("submit", "order", "recipes", "cancel"),
    "Look": ("list", "show", "tail", "events", "deliveries", "discarded", "handlers", "explain"),
    "Mend": ("retry", "replay", "replays", "pause", "resume", "erase"),
    "Operate": ("doctor", "settings", "backup", "wake-url"),
}
"""The commands by what they are for, as `--help` shows them."""


def _place(command: CommandInfo) -> int:
    names = [name for group in PANELS.values() for name in group]
    called = command.name or getattr(command.callback, "__name__", "")
    return names.index(called) if called in names else len(names)


class _Program(typer.Typer):
    """The commands, on whatever terminal they find."""

    def command(self, name: str | None = None, **given: Any) -> Callable[[F], F]:
        def register(function: F) -> F:
            called = name or function.__name__
            panel = next((title for title, names in PANELS.items() if called in names), None)
            more = {"rich_help_panel": panel, **given}
            super(_Program, self).command(name, **more)(function)
            self.registered_commands.sort(key=_place)
            return function

        return register

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):  # of an encoding that may not have all we say
                stream.reconfigure(errors="backslashreplace")
        if not os.environ.get("TERMINAL_WIDTH", "0").isdecimal():
            del os.environ["TERMINAL_WIDTH"]  # typer would raise
        for text in sys.argv[1:]:
            if any("\udc80" <= char <= "\udcff" for char in text):  # as Python reads other bytes
                say(f"receiver: {text!r} is not UTF-8", err=True, colour=typer.colors.RED)
                sys.exit(2)
        return super().__call__(*args, **kwargs)


main = _Program(
    name="receiver",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # rich's own would take [fail] in a text for a style
)

_SWITCH: Final = 0.0005
"""Seconds between offers of the interpreter lock: the writing thread needs it often and briefly,
and at Python's 5 ms every one of its steps would wait that long behind a busy event loop."""
_COLLECT: Final = 10_000
"""New objects between two collections of the youngest; Python's 700 suits small programs."""
_PROSE: Final = ("prompt", "text")
"""Ends of the names of inputs that are always text, whatever it looks like."""
_INPUT_HELP: Final = (
    "The input. A value may be JSON, as in num_images=2, but a prompt (or what ends in `prompt` or "
    "`text`) is taken as it is. NAME:=JSON is always JSON. NAME=@FILE sends a picture or another "
    "file of this machine, up to 3 MB, as a data URI; for a real @ at the beginning write @@."
)
_COLOURS: Final = {"ok": "green", "warn": "yellow", "FAIL": "red"}

Handlers = Annotated[
    list[str] | None, typer.Argument(help="Files, modules or installed names (log, save, forward).")
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)]
Limit = Annotated[int, typer.Option(help="How many, newest first.", min=1)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one line each.")]
All = Annotated[bool, typer.Option("--all", help="All that there are, however many.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
Wide = Annotated[bool, typer.Option("--wide", help="All columns, nothing cut, whole times.")]
Dev = Annotated[
    bool, typer.Option("--dev", help="For your own machine: make up secrets, read .env.")
]
Id = Annotated[str, typer.Argument(metavar="ID", help="As much of it as no other id begins with.")]
HandlerName = Annotated[str, typer.Argument(metavar="HANDLER")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for the outcome.")]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="NAME=VALUE", help="Text kept with it; NAME:=JSON is JSON."),
]
Key = Annotated[str | None, typer.Option("--key", help="Idempotency-Key.")]
OfModel = Annotated[str | None, typer.Option("--model", help="Only of models like this (a glob).")]
OfMetadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="NAME=GLOB", help="Only with such metadata."),
]
OfProvider = Annotated[str | None, typer.Option("--provider", help="Only of this provider.")]


def _tell_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("prediction-receiver"))
        raise typer.Exit


@main.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Say the version.", callback=_tell_version, is_eager=True),
    ] = False,
) -> None:
    """Submit predictions, record every outcome exactly once, run your handlers on it."""


# --- what runs ---


@main.command()
def init(
    folder: Annotated[str, typer.Argument(help="Where to; by default here.")] = ".",
) -> None:
    """Write a project to start from: a handler, its test, .env with secrets, compose.yaml.

    Nothing that is there already is changed.
    """
    from receiver.cli.init import init

    with _failing(OSError):
        init(folder)


@main.command(epilog="Settings are environment variables; `receiver settings` lists them.")
def serve(
    handlers: Handlers = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on; without it HOST, else 127.0.0.1 (0.0.0.0 if PORT is set).",
            show_default=False,
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            help="Port to listen on; without it PORT, else 8000.",
            min=0,
            max=65535,
            show_default=False,
        ),
    ] = None,
    dev: Dev = False,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="With emulated providers; includes --dev.")
    ] = False,
    tries: Annotated[
        bool, typer.Option("--try", help="Submit a first prediction to each provider.")
    ] = False,
    reloads: Annotated[
        bool | None,
        typer.Option(
            "--reload/--no-reload",
            help="Load handlers anew when their files change; on with --dev.",
            show_default=False,
        ),
    ] = None,
    no_dispatch: Annotated[
        bool, typer.Option("--no-dispatch", help="Accept only: handlers run elsewhere.")
    ] = False,
) -> None:
    """Run the receiver: the API, the callbacks, and the handlers.

    On your own machine begin with `receiver serve --emulate my_handlers.py`: nothing is to be set,
    and no real provider is asked. With --dev, `.env` of this folder is read; the environment goes
    before it.
    """
    from receiver.settings import Listening

    with _failing():
        _read_env_file(dev=dev or emulate)
        where = Listening.read(os.environ, host, port, dev=dev or emulate)
    if dev or emulate or reloads:
        from receiver.cli import dev as development

        with _failing():
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
        return
    if tries:
        raise typer.BadParameter("--try goes with --emulate or --dev")
    import asyncio

    from receiver.coldstart import create_app, migrate
    from receiver.http.listening import listening
    from receiver.http.server import Server

    settings = _settings(handlers, dev=dev)
    with _failing(), listening(where.host, where.port) as sockets:
        if settings.mode != "serverless":  # there it is a step of the deployment
            asyncio.run(migrate(settings))
        app = create_app(settings, dispatch=not no_dispatch)
        sys.setswitchinterval(_SWITCH)
        _spare_the_collector()
        Server(app, where.host, where.port).run(sockets)


@main.command()
def worker(handlers: Handlers = None, dev: Dev = False) -> None:
    """Run deliveries only, beside servers on the same PostgreSQL."""
    import uvloop

    from receiver.coldstart import work
    from receiver.http.server import LINGER, exit_after, run, told_to_stop

    settings = _settings(handlers, dev=dev)

    async def working() -> None:
        async with told_to_stop() as told:
            await work(settings, told)
        exit_after(LINGER, 0)

    _spare_the_collector()
    with _failing():
        run(working(), uvloop.new_event_loop())


@main.command()
def drain(
    handlers: Handlers = None,
    seconds: Annotated[float, typer.Option(help="For how long at most.", min=1)] = 25.0,
    dev: Dev = False,
) -> None:
    """Run what is due (deliveries, submits, polls), then exit: for cron."""
    import asyncio

    from receiver.coldstart import drain
    from receiver.http.server import LINGER, exit_after, run, told_to_stop

    settings = _settings(handlers, dev=dev)

    async def draining() -> None:
        async with told_to_stop() as told:
            print_plainly(await drain(settings, seconds, told))
        exit_after(LINGER, 0)

    with _failing():
        run(draining(), asyncio.new_event_loop())


@main.command("wake-url")
def wake_url(dev: Dev = False) -> None:
    """Print the URL that drains when it is POSTed to, for schedulers that can send no key."""
    from receiver.predictions.tokens import Tokens

    settings = _settings(None, dev=dev)
    if settings.public_url is None:
        raise typer.BadParameter("set RECEIVER_PUBLIC_URL: the wake-up URL begins with it")
    token = Tokens([key.reveal() for key in settings.secret_keys]).wake()
    say(f"{settings.public_url}/wake/{token}")


@main.command()
def migrate(dev: Dev = False) -> None:
    """Bring the database's schema up to date; `serve` and `worker` do so by themselves."""
    import asyncio

    from receiver.coldstart import migrate

    settings = _settings(None, dev=dev)
    with _failing():
        asyncio.run(migrate(settings))
    say(f"{settings.database} is up to date")


@main.command()
def backup(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Copy the database of a receiver, which may go on running (SQLite)."""
    from receiver.settings import Settings
    from receiver.store.sqlite.backup import back_up

    with _failing():
        settings = Settings.read(_environment(None, dev=True))  # no secret is needed for it
        if settings.sqlite_path is None:
            raise ReceiverError(
                f"{settings.database} is PostgreSQL's to back up: pg_dump --format=custom "
                f'--schema=receiver --file={shlex.quote(file)} "$RECEIVER_DATABASE_URL"; '
                "pg_restore brings it back"
            )
        made = back_up(settings.sqlite_path, file, force=force)
    say(
        f"{made.path}: {made.size:,} bytes (of a database of {made.of:,}), "
        f"{made.predictions:,} predictions, in {made.seconds:.1f} s"
    )


def _settings(handlers: list[str] | None, *, dev: bool) -> Settings:
    """Read the settings and set the logs up, as every command that runs something does."""
    from dataclasses import replace

    from receiver.observability import logging as logs
    from receiver.settings import Settings

    with _failing():
        _read_env_file(dev=dev)
        settings = Settings.read(_environment(None, dev=dev))
    if handlers:  # as they are: a path may have a comma
        settings = replace(settings, handlers=tuple(handlers))
    logs.configure(settings.log_format, settings.log_level)
    return settings


def _read_env_file(*, dev: bool) -> None:
    """In development set what `.env` of this folder sets: handlers read the environment too."""
    from receiver.settings import env_file

    if dev:
        os.environ.update(env_file.merged(os.environ))


def _environment(handlers: list[str] | None, *, dev: bool) -> dict[str, str]:
    """Return the environment as the arguments change it."""
    env = dict(os.environ) | ({"RECEIVER_DEV": "1"} if dev else {})
    return env | ({"RECEIVER_HANDLERS": ",".join(handlers)} if handlers else {})


def _spare_the_collector() -> None:
    """Keep what start-up made out of every collection, and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT, 20, 20)


@main.command()
def emulate(
    host: Host = "127.0.0.1",
    port: Port = 8001,
    seconds: Annotated[float, typer.Option(help="How long a picture takes.")] = 0.8,
    shape: Annotated[str, typer.Option(help="Wire shapes: new, old or mixed.")] = "mixed",
    receiver: Annotated[
        str, typer.Option(help="The address of the receiver that chat platforms call.")
    ] = "http://127.0.0.1:8000",
) -> None:
    """Serve Oxen.ai, Eachlabs, fal.ai, Slack, Discord and Telegram here, for tests and demos.

    It prints what a receiver needs to use them; `serve --emulate` needs nothing of that.
    `receiver chat` opens a chat.
    A word in a prompt says how its prediction goes:

    - [fail] the model fails; [timeout] it runs out of time
    - [moderated] the content policy stops it
    - [refuse] the submit is refused, as the balance is used up
    - [slow] it takes ten times as long; [fast] it takes no time; [never] it never ends
    - [text] the model answers in words
    - [lose_callback] nobody is told; [repeat_callback] it is told three times
    - [delay_callback] it is told late; [early_callback] before the submit is answered
    - [refuse_submit] HTTP 503; [drop_submit] no answer; [stall_submit] the same, but billed
    - [break_poll] every poll fails; [large_output] pictures come as data URIs
    - [wrong_signature] and [stale_timestamp] callbacks that prove nothing
    """
    import msgspec

    from receiver.cli.emulating import emulate

    with _failing(msgspec.ValidationError):
        emulate(host, port, seconds, shape, receiver.rstrip("/"))


@main.command()
def demo(
    folder: Annotated[str | None, typer.Option(help="Where to save the pictures.")] = None,
    seconds: Annotated[float, typer.Option(help="How long a picture takes.")] = 1.5,
) -> None:
    """Show it all on one screen: three emulated providers, their outcomes, handlers at work."""
    from receiver.cli.demo import run

    with _failing(OSError):
        code = run(folder, seconds)
    raise typer.Exit(code)


chat = typer.Typer()
"""`receiver chat` opens the terminal; commands of its own, like those for setting up, fit in."""
main.add_typer(chat, name="chat", rich_help_panel="Run")


@chat.callback(invoke_without_command=True)
def chat_terminal(
    ctx: typer.Context,
    platform: Annotated[
        Literal["slack", "discord", "telegram"],
        typer.Option("--as", help="Which platform it is to be."),
    ] = "slack",
    person: Annotated[str, typer.Option(help="Who you are there.")] = "U1",
    place: Annotated[str, typer.Option(help="Where; D is a direct conversation.")] = "C1",
    emulator: Annotated[
        str, typer.Option(help="The emulator's address, as `serve --emulate` says it.")
    ] = "http://127.0.0.1:8001",
    linger: Annotated[
        float, typer.Option(help="Seconds without news after which the end of a pipe is the end.")
    ] = 5.0,
) -> None:
    """Chat with the handlers of a `receiver serve --emulate`, as on Slack, Discord or Telegram.

    Type `/imagine a lighthouse`; a number presses the button of that number; Ctrl-D ends it.
    """
    if ctx.invoked_subcommand is not None:
        return
    from receiver.cli.terminal import Terminal

    with _failing():
        Terminal(emulator.rstrip("/"), platform, person, place).run(linger)


@chat.command("slack")
def chat_slack(
    name: Annotated[str, typer.Option(help="The name of the app, and of its bot.")] = "imagine",
    dev: Dev = False,
) -> None:
    """Print the manifest of an app in Slack: a command for each recipe, at RECEIVER_PUBLIC_URL."""
    from receiver.cli import chats

    with _failing():
        typer.echo(chats.show_manifest(_chat_settings(dev=dev), name))


@chat.command("discord")
def chat_discord(
    guild: Annotated[
        str, typer.Option(help="One server's id: its commands change at once; else those of all.")
    ] = "",
    dev: Dev = False,
) -> None:
    """Register each recipe as a command in Discord, in place of all that were there."""
    from receiver.cli import chats

    with _failing():
        typer.echo(chats.register_in_discord(_chat_settings(dev=dev), os.environ, guild))


@chat.command("telegram")
def chat_telegram(
    poll: Annotated[
        bool, typer.Option("--poll", help="Remove the webhook, for TELEGRAM_POLL=1.")
    ] = False,
    dev: Dev = False,
) -> None:
    """Set Telegram's webhook and menu of commands."""
    from receiver.cli import chats

    with _failing():
        typer.echo(chats.set_telegram_up(_chat_settings(dev=dev), os.environ, poll=poll))


def _chat_settings(*, dev: bool) -> Settings:
    """Read the settings; there must be recipes."""
    from receiver.model.errors import ReceiverError
    from receiver.settings import Settings, development

    _read_env_file(dev=dev)
    settings = development.with_secrets(Settings.read(_environment(None, dev=dev)))
    if not settings.recipes.recipes:
        raise ReceiverError("there are no recipes: RECEIVER_RECIPES names their file")
    return settings


# --- what looks at a running receiver ---


@main.command()
def submit(
    provider: Annotated[str, typer.Argument(help="oxen, eachlabs or fal.")],
    model: Annotated[str, typer.Argument(help="The provider's own name for it.")],
    values: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=VALUE…", help=_INPUT_HELP),
    ] = None,
    wait: Wait = False,
    sync: Annotated[
        bool, typer.Option("--sync", help="Use the provider's blocking endpoint.")
    ] = False,
    metadata: Metadata = None,
    key: Key = None,
) -> None:
    """Submit a prediction; exits 1 if it is known to have failed.

    With --wait, what happens is said on stderr, and Ctrl-C leaves the prediction running.
    """
    headers = _keyed(key)
    body = {
        "provider": provider,
        "model": model,
        "input": _input(values),
        "metadata": _metadata(metadata),
        "mode": "sync" if sync else "queue",
    }
    if wait and sync:  # or else the first answer is that of the provider
        headers["Prefer"] = "wait=1"
    with _client() as client:
        _submit(client, "/v1/predictions", body, headers, wait=wait)


@main.command(context_settings={"ignore_unknown_options": True})
def order(
    recipe: Annotated[
        str,
        typer.Argument(
            help="`receiver recipes` lists them; with a name it says how that is ordered."
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WORDS…",
            help="As people type it: the text, and options of the recipe as --ratio 16:9 or "
            "ratio=16:9. A picture may be @FILE of this machine.",
        ),
    ] = None,
    person: Annotated[
        str | None, typer.Option("--person", help="Who orders it: for allow lists and limits.")
    ] = None,
    place: Annotated[str | None, typer.Option("--place", help="Where; likewise.")] = None,
    wait: Wait = False,
    metadata: Metadata = None,
    key: Key = None,
) -> None:
    """Order by a recipe; exits 1 if it is known to have failed.

    With --wait, what happens is said on stderr, and Ctrl-C leaves the prediction running.
    """
    headers = _keyed(key)
    from receiver.cli import ordering

    about = {"person": person, "place": place}
    with _client() as client:
        body = {
            "options": ordering.options_of(client, recipe, words or ()),
            "metadata": _metadata(metadata),
            **{name: text for name, text in about.items() if text is not None},
        }
        _submit(client, f"/v1/recipes/{_quoted(recipe)}", body, headers, wait=wait)


@main.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Say how this one is ordered.")] = None,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """List what there is to order, or say how one of it is ordered."""
    from receiver.cli import ordering

    with _client() as client:
        if name is not None:
            typer.echo("\n".join(map(spelled, ordering.explained(client, name).split("\n"))))
        elif as_json:
            _show(client.get("/v1/recipes")["data"], (), as_json=True, wide=wide)
        else:
            columns = ("name", "about", "options", "price")
            _show(ordering.listed(client), columns, ("provider", "model"), as_json=False, wide=wide)


@main.command(name="list")
def list_(
    status: Annotated[str | None, typer.Option(help="Only in this status.")] = None,
    provider: OfProvider = None,
    model: OfModel = None,
    metadata: OfMetadata = None,
    since: Annotated[
        str | None, typer.Option(help="Only those made since: 24h, 7d, or RFC 3339.")
    ] = None,
    limit: Limit = 20,
    everything: All = False,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """List predictions, newest first."""
    from receiver.cli.replay import moment

    with _failing():
        begin = since and moment(since, time())
    params = {"status": status, "provider": provider, "model": model, "since": begin}
    params |= {f"metadata.{name}": glob for name, glob in _texts(metadata).items()}
    _list(
        "/v1/predictions",
        params,
        None if everything else limit,
        ("id", "provider", "model", "status", "created_at", "error"),
        ("channel", "metadata"),
        as_json=as_json,
        wide=wide,
    )


@main.command()
def events(
    kind: Annotated[
        str | None, typer.Option("--type", help="Only these: succeeded,failed,canceled.")
    ] = None,
    provider: OfProvider = None,
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="NAME=VALUE", help="Only with this.")
    ] = None,
    limit: Limit = 20,
    everything: All = False,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """List events, the ends of predictions, newest first; `tail` follows them."""
    params = {"type": kind, "provider": provider}
    params |= {f"metadata.{name}": value for name, value in _texts(metadata).items()}
    columns = ("id", "provider", "model", "status", "channel", "time", "error")
    _list(
        "/v1/events",
        params,
        None if everything else limit,
        columns,
        ("metadata",),
        as_json=as_json,
        wide=wide,
        change=lambda row: {**row["prediction"], **row},
    )


@main.command()
def show(prediction_id: Id, wide: Wide = False, as_json: AsJson = False) -> None:
    """Show one prediction and what became of its event, by the id of any of them."""
    from receiver.cli.lists import asking, whole_id
    from receiver.cli.show import show

    with _client() as client:
        name = whole_id(client, prediction_id)
        prediction = client.get(f"/v1/predictions/{_quoted(name)}")
        wanted = {"prediction": name, "limit": 100}
        deliveries = client.get(asking("/v1/deliveries", wanted))["data"]
        if as_json:
            print_plainly({**prediction, "deliveries": deliveries})
        else:
            show(prediction, deliveries, wide=wide)


@main.command()
def tail(
    kind: Annotated[
        str | None, typer.Option("--type", help="Only these: succeeded,failed,queued, …")
    ] = None,
    provider: Annotated[str | None, typer.Option(help="Only of these providers.")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", metavar="NAME=VALUE", help="Only with this.")
    ] = None,
    after: Annotated[
        int | None, typer.Option(help="From this place on (`seq` in JSON); 0: all there is.", min=0)
    ] = None,
    count: Annotated[int | None, typer.Option(help="End after so many lines.", min=1)] = None,
    deliveries: Annotated[
        bool,
        typer.Option(
            "--deliveries/--no-deliveries",
            help="What handlers do, too: live only, not from before.",
        ),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Show what happens, as it happens: changes, events, and the attempts of handlers.

    It goes on after a lost connection, without a gap in what happens to predictions.
    """
    from itertools import islice

    from rich.console import Console

    from receiver.cli.tail import follow, show

    params = {name: value for name, value in (("type", kind), ("provider", provider)) if value}
    params |= {f"metadata.{name}": value for name, value in _texts(metadata).items()}
    params |= {"deliveries": "true"} if deliveries else {}
    console = Console(highlight=False)
    try:
        with _client() as client:
            place = None if after is None else str(after)
            found = follow(client, params, place, lambda text: say(f"-- {text}", err=True))
            for message in islice(found, count):
                if as_json:
                    print_plainly(message)
                else:
                    show(console, message)
    except KeyboardInterrupt:
        raise typer.Exit from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on


@main.command()
def cancel(prediction_id: Id) -> None:
    """Cancel a prediction at its provider."""
    print_value(_change(prediction_id, "cancel"))


@main.command()
def replay(
    prediction_id: Annotated[
        str | None, typer.Argument(metavar="ID", help="One prediction; or else say which:")
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Events from then on: 24h, 7d, or RFC 3339.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Events before then.")] = None,
    provider: OfProvider = None,
    model: OfModel = None,
    handler: Annotated[str | None, typer.Option(help="Only to this handler.")] = None,
    state: Annotated[
        str | None, typer.Option(help="Only deliveries that are done, skipped or dead.")
    ] = None,
    metadata: OfMetadata = None,
    yes: Yes = False,
) -> None:
    """Redeliver events to their handlers: one prediction's, or all that match."""
    from receiver.cli.replay import moment, replay

    now = time()
    with _failing():
        since, until = (text and moment(text, now) for text in (since, until))
    given = {
        "since": since,
        "until": until,
        "provider": provider,
        "model": model,
        "handler": handler,
        "state": state,
        "metadata": _texts(metadata),
    }
    wanted = {name: value for name, value in given.items() if value}
    with _client() as client:
        if prediction_id is None:
            replay(client, wanted, yes=yes)
        elif wanted:
            raise ReceiverError("name one prediction, or say which, but not both")
        else:
            print_value(_change(prediction_id, "replay"))


@main.command()
def replays(
    cancel: Annotated[str | None, typer.Option(metavar="ID", help="Stop this one.")] = None,
    limit: Limit = 20,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """List the replays in bulk, newest first, or cancel one."""
    from receiver.cli.lists import whole_id

    columns = ("id", "state", "events", "matched", "replayed", "wanted", "created_at", "ended_at")
    if cancel is not None:
        with _client() as client:
            name = whole_id(client, cancel, "rep")
            print_value(client.post(f"/v1/replays/{_quoted(name)}/cancel"))
        return
    _list("/v1/replays", {}, limit, columns, as_json=as_json, wide=wide)


@main.command()
def discarded(
    kind: Annotated[
        str | None, typer.Option(help="duplicate, late, unknown, rejected or unmatched.")
    ] = None,
    provider: OfProvider = None,
    prediction: Annotated[str | None, typer.Option(help="Only of this prediction.")] = None,
    limit: Limit = 20,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """List what came and reached no handler, the latest first."""
    columns = ("kind", "reason", "provider", "from", "prediction_id", "times", "last_at")
    _list(
        "/v1/discarded",
        {"kind": kind, "provider": provider, "prediction": prediction},
        limit,
        columns,
        ("first_at",),
        as_json=as_json,
        wide=wide,
        change=lambda row: {**row, "from": row["channel"] or row["source"]},
    )


@main.command()
def erase(prediction_id: Id, yes: Yes = False) -> None:
    """Erase what a prediction was about; its id, status and times stay.

    On a terminal it asks first.
    """
    from receiver.cli.lists import whole_id
    from receiver.cli.replay import is_interactive

    with _client() as client:
        name = whole_id(client, prediction_id)
        if not yes and is_interactive():
            prediction = client.get(f"/v1/predictions/{_quoted(name)}")
            about = " ".join(str(prediction[word]) for word in ("id", "model", "status"))
            say(f"{about}: input, metadata and outputs go for good.", err=True)
            typer.confirm("Erase it?", abort=True)
        print_value(client.post(f"/v1/predictions/{_quoted(name)}/erase"))


@main.command()
def explain(
    name: Annotated[str, typer.Argument(metavar="EVENT_OR_PREDICTION")],
    kind: Annotated[
        str | None, typer.Option("--type", help="If it were succeeded, failed or canceled.")
    ] = None,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """Say which handlers run for an event, and why the others do not."""
    from receiver.cli.lists import asking, whole_id

    with _client() as client:
        path = f"/v1/predictions/{_quoted(whole_id(client, name))}/explain"
        found = client.get(asking(path, {"type": kind}))
    if as_json:
        print_plainly(found)
        return
    rows = [
        {
            "handler": row["handler"],
            "runs": "yes" if row["runs"] else "no",
            "because": row["reason"]
            or row["held"]
            or (f"after {', '.join(row['after'])}" if row["after"] else ""),
            **{name: (row["delivery"] or {}).get(name) for name in ("state", "attempts", "reason")},
        }
        for row in found["handlers"]
    ]
    assumed = " (if it ends so)" if found["assumed"] else ""
    say(f"{found['prediction']}: {found['type']}{assumed}")
    columns = ("handler", "runs", "because", "state", "attempts", "reason")
    _show(rows, columns, as_json=False, wide=wide)


@main.command()
def deliveries(
    state: Annotated[
        str | None, typer.Option(help="pending, running, done, skipped or dead.")
    ] = None,
    handler: Annotated[str | None, typer.Option(help="Only of this handler.")] = None,
    prediction: Annotated[str | None, typer.Option(help="Only of this prediction.")] = None,
    limit: Limit = 20,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """List deliveries, newest first: what is pending, done, dead."""
    params = {"state": state, "handler": handler, "prediction": prediction}
    columns = ("prediction_id", "model", "handler", "state", "attempts", "due_at", "reason")
    more = ("id", "created_at", "round")
    _list("/v1/deliveries", params, limit, columns, more, as_json=as_json, wide=wide)


@main.command()
def retry(
    delivery_id: Id,
    handler: Annotated[
        str | None, typer.Option(help="Which one, where ID is that of a prediction.")
    ] = None,
) -> None:
    """Try a dead or skipped delivery again, or a waiting one at once."""
    from receiver.cli.lists import delivery_to_retry

    with _client() as client:
        name = delivery_to_retry(client, delivery_id, handler)
        print_value(client.post(f"/v1/deliveries/{_quoted(name)}/retry"))


@main.command()
def handlers(wide: Wide = False, as_json: AsJson = False) -> None:
    """List handlers: what is pending for each, and its state."""
    columns = ("name", "state", "pending", "registered", "paused_at", "open_until", "reason")
    _show(_call("get", "/v1/handlers")["data"], columns, as_json=as_json, wide=wide)


@main.command()
def pause(name: HandlerName) -> None:
    """Let no delivery of a handler begin; its deliveries stay pending."""
    print_value(_call("post", f"/v1/handlers/{_quoted(name)}/pause"))


@main.command()
def resume(name: HandlerName) -> None:
    """Let a handler's deliveries run again, whether it was paused or failed."""
    print_value(_call("post", f"/v1/handlers/{_quoted(name)}/resume"))


@main.command()
def doctor(
    handlers: Handlers = None,
    as_json: AsJson = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 2 where there are warnings.")
    ] = False,
    dev: Dev = False,
) -> None:
    """Say what is wrong here and how to fix it; exits 1 if anything would not work."""
    import asyncio

    from receiver.cli.doctor import examine, worst
    from receiver.http.server import LINGER, exit_after

    with _failing():
        _read_env_file(dev=dev)
    env = _environment(handlers, dev=dev)
    codes = {"FAIL": 1, "warn": 2 if strict else 0, "ok": 0}

    async def run() -> int:
        found = await examine(env)
        if as_json:
            print_plainly({"worst": worst(found), "data": found})
        else:
            for finding in found:
                level = typer.style(f"{finding.level:4}", fg=_COLOURS[finding.level])
                typer.echo(f"{level}  {spelled(str(finding))}")
        sys.stdout.flush()
        # A name server that does not answer would keep a thread, and so the process.
        exit_after(LINGER, codes[worst(found)])
        return codes[worst(found)]

    raise typer.Exit(asyncio.run(run()))


@main.command()
def settings(as_json: AsJson = False) -> None:
    """List the settings, which are environment variables: their defaults, and what they are."""
    from receiver.cli.settings import settings

    settings(as_json=as_json)


# --- helpers of the above ---


def _keyed(key: str | None) -> dict[str, str]:
    """Return the header of a key that was given."""
    with _failing():
        if key and not (key.isascii() and key.isprintable()):
            raise ReceiverError("--key must be printable ASCII, as it travels in a header")
    return {"Idempotency-Key": key} if key else {}


def _submit(
    client: Client, path: str, body: Any, headers: Mapping[str, str], *, wait: bool
) -> NoReturn:
    """Submit, print the prediction as it is then or at its end, and exit: 1 if it has failed."""
    from receiver.cli import waiting

    place = client.place() if wait else None
    prediction = client.post(path, body, headers)
    if wait:
        prediction = waiting.wait(client, prediction, place)
    print_value(prediction)
    if wait:
        waiting.say_addresses(prediction)
    raise typer.Exit(int(prediction["status"] in {"failed", "canceled"}))


@contextmanager
def _failing(*kinds: type[Exception]) -> Iterator[None]:
    """End the command with one line, and with 1, where something refuses."""
    told: tuple[type[Exception], ...] = (ReceiverError, *kinds)
    try:
        yield
    except told as error:
        is_ours = isinstance(error, SettingsError | HandlerError)
        hint = _hint() if isinstance(error, HandlerError) else ""
        say(f"receiver: {error}{hint}", lines=is_ours, err=True, colour=typer.colors.RED)
        raise typer.Exit(1) from None


def _hint() -> str:
    """Return a hint where a handler was named as a module and lies here as a file."""
    for name in (*sys.argv[1:], *os.environ.get("RECEIVER_HANDLERS", "").split(",")):
        if name.isidentifier() and Path(f"{name}.py").is_file():
            return f" ({name}.py is here: name it with its ending)"
    return ""


@contextmanager
def _client() -> Iterator[Client]:
    """Yield a client of the receiver that runs; what it refuses ends the command."""
    from receiver.cli.client import Client

    with _failing(), closing(Client(os.environ)) as client:
        yield client


def _call(method: str, path: str, *more: Any) -> Any:
    with _client() as client:
        return client.get(path, *more) if method == "get" else client.post(path, *more)


def _change(part: str, verb: str) -> Any:
    """Ask for a change of the prediction whose id begins so."""
    from receiver.cli.lists import whole_id

    with _client() as client:
        return client.post(f"/v1/predictions/{_quoted(whole_id(client, part))}/{verb}")


def _quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")


def _texts(texts: list[str] | None) -> dict[str, str]:
    """Read NAME=VALUE."""
    with _failing():
        return dict(_split(text) for text in texts or [])


def _input(texts: list[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE, NAME=@FILE and NAME:=JSON; a value may be JSON, but a prompt is text."""
    with _failing():
        return dict(_pair(text, _guessed) for text in texts or [])


def _metadata(texts: list[str] | None) -> dict[str, Any]:
    """Read NAME=VALUE and NAME:=JSON."""
    with _failing():
        return dict(_pair(text, lambda _, value: value) for text in texts or [])


def _pair(text: str, read: Callable[[str, str], Any]) -> tuple[str, Any]:
    name, value = _split(text)
    if not name.endswith(":"):
        return name, read(name, value)
    name = name.rstrip(":")
    found = _json(value)
    if found is None:
        raise ReceiverError(f"{name}:= wants JSON, and {value!r} is none")
    return name, found


def _guessed(name: str, value: str) -> Any:
    if name.endswith(_PROSE):
        return value
    if value.startswith("@@"):
        return value[1:]
    return _file(value[1:]) if value.startswith("@") else _json(value) or value


def _file(path: str) -> str:
    from receiver.client import ClientError, file

    try:
        return file(path)
    except ClientError as error:
        raise ReceiverError(str(error).removesuffix(": say content_type=")) from error


def _json(text: str) -> Any:
    """Return JSON as it was written, as a number keeps all its digits; None: it is none."""
    import msgspec

    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None
    return msgspec.Raw(text.encode())


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip(":"):
        raise ReceiverError(f"{text!r} is not NAME=VALUE")
    return name, value


def _list(
    path: str,
    params: dict[str, Any],
    limit: int | None,
    columns: tuple[str, ...],
    more: tuple[str, ...] = (),
    *,
    as_json: bool,
    wide: bool,
    change: Callable[[Any], Any] | None = None,
) -> None:
    """Print what a list of the receiver has; `change` makes the rows of a table."""
    from receiver.cli.lists import rows, whole_id

    notices: list[str] = []
    with _client() as client:
        if params.get("prediction"):
            params["prediction"] = whole_id(client, params["prediction"])
        found = rows(client, path, params, limit, notices.append)
        shown = map(change, found) if change and not as_json else found
        _show(shown, columns, more, as_json=as_json, wide=wide)
    for notice in notices:
        say(f"-- {notice}", err=True)


def _show(
    rows: Iterable[Any],
    columns: tuple[str, ...],
    more: tuple[str, ...] = (),
    *,
    as_json: bool,
    wide: bool,
) -> None:
    """Print rows as JSON lines, or as a table; `more` are columns of a wide one."""
    from receiver.cli.tables import print_table

    if as_json:
        for row in rows:
            print_plainly(row)
    else:
        found = list(rows)
        print_table(found, columns, more, wide=wide)
        if not found:
            say("-- there are none", err=True)
