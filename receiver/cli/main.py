"""The entry point of the command line, with a fast path for a plain `receiver serve`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from receiver.cli import serving
from receiver.model.errors import ReceiverError

_HIGHEST_PORT = 65535


class Plain(NamedTuple):
    """The arguments of a plain `receiver serve`."""

    handlers: Sequence[str] = ()
    host: str | None = None
    port: int | None = None
    dispatch: bool = True


def main() -> None:
    """Run a command; a plain `receiver serve` does not load the command-line parser.

    Loading typer and its dependencies and creating all commands takes a third of a cold start.
    """
    given = plain(sys.argv[1:])
    if given is None:
        from receiver.cli import commands

        commands.main()
        return
    try:
        serving.serve(*given)
    except ReceiverError as error:
        from receiver.cli.program import print_error

        print_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def plain(arguments: Sequence[str]) -> Plain | None:
    """Parse a `serve` as servers start it; return None if typer must parse the arguments."""
    command, *words = arguments or ("",)
    given = Plain()
    handlers = []
    while words and command == "serve":
        match words:
            case ["--host", host, *words] if not host.startswith("-"):
                given = given._replace(host=host)
            case ["--port", port, *words] if port.isdecimal() and int(port) <= _HIGHEST_PORT:
                given = given._replace(port=int(port))
            case ["--no-dispatch", *words]:
                given = given._replace(dispatch=False)
            case [name, *words] if name.isprintable() and not name.startswith("-"):
                handlers.append(name)
            case _:
                return None
    return given._replace(handlers=handlers) if command == "serve" else None
