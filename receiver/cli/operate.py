"""Commands for operators: diagnosis, settings, backup, the wake-up URL."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Final

import typer

from receiver.cli.output import print_line, print_plainly
from receiver.cli.program import panel
from receiver.cli.words import AsJson, Dev, Handlers
from receiver.model.errors import ReceiverError
from receiver.model.text import spelled

command = panel("Operate")

_COLOURS: Final = {"ok": "green", "warn": "yellow", "FAIL": "red"}


@command()
def doctor(
    handlers: Handlers = None,
    as_json: AsJson = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 2 if there are warnings.")] = False,
    dev: Dev = False,
) -> None:
    """Check settings, database, providers and more; report what is wrong and how to fix it.

    Exits 1 if anything would not work.
    """
    import asyncio

    from receiver.cli.doctor import examine, worst
    from receiver.cli.environment import environment, read_env_file
    from receiver.http.stopping import LINGER, exit_after

    read_env_file(dev=dev)
    env = environment(dev=dev)
    codes = {"FAIL": 1, "warn": 2 if strict else 0, "ok": 0}

    async def run() -> int:
        found = await examine(env, handlers)
        if as_json:
            print_plainly({"worst": worst(found), "data": found})
        else:
            for finding in found:
                level = typer.style(f"{finding.level:4}", fg=_COLOURS[finding.level])
                typer.echo(f"{level}  {spelled(str(finding))}")
        sys.stdout.flush()
        # A thread that waits for a name server would keep the process alive.
        exit_after(LINGER, codes[worst(found)])
        return codes[worst(found)]

    raise typer.Exit(asyncio.run(run()))


@command()
def settings(as_json: AsJson = False) -> None:
    """List the settings, which are environment variables, with defaults and meaning."""
    from receiver.cli.settings import settings

    settings(as_json=as_json)


@command()
def backup(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
) -> None:
    """Copy the SQLite database of a receiver, even while it is running."""
    from receiver.cli.environment import environment
    from receiver.settings import Settings
    from receiver.store.sqlite.backup import back_up

    settings = Settings.read(environment(dev=True))  # dev: needs no secret
    if settings.sqlite_path is None:
        raise ReceiverError(
            f"{settings.database} is PostgreSQL's to back up: pg_dump --format=custom "
            f'--schema=receiver --file={shlex.quote(file)} "$RECEIVER_DATABASE_URL"; '
            "pg_restore brings it back"
        )
    made = back_up(settings.sqlite_path, file, force=force)
    print_line(
        f"{made.path}: {made.size:,} bytes (of a database of {made.of:,}), "
        f"{made.predictions:,} predictions, in {made.seconds:.1f} s"
    )


@command("wake-url")
def wake_url(dev: Dev = False) -> None:
    """Print a URL that runs due work on each POST, for schedulers that send no key."""
    from receiver.cli.environment import settings
    from receiver.predictions.tokens import Tokens

    given = settings(dev=dev)
    if given.public_url is None:
        raise typer.BadParameter("set RECEIVER_PUBLIC_URL: the wake-up URL begins with it")
    token = Tokens([key.reveal() for key in given.secret_keys]).wake()
    print_line(f"{given.public_url}/wake/{token}")
