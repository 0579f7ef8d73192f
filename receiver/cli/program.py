"""The Typer app of `receiver`: commands in panels, and the error message that ends one."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer
from typer.core import TyperGroup

from receiver.cli.output import print_line
from receiver.model.errors import HandlerError, ReceiverError, SettingsError

F = TypeVar("F", bound=Callable[..., Any])

PANELS: Final = ("Run", "Predict", "Look", "Change", "Operate")
"""The titles of the panels of `--help`, in their order."""


_FULL: Final = {errno.ENOSPC, errno.EDQUOT}
"""Errors of writes that are not a fault of ours: the disk, or the user's part of it, is full."""


class _Commands(TyperGroup):
    """The commands in the order of their panels; a ReceiverError ends one with its message."""

    def list_commands(self, _: Any) -> list[str]:
        return sorted(self.commands, key=self._place)

    def _place(self, name: str) -> int:
        return PANELS.index(getattr(self.commands[name], "rich_help_panel", ""))

    def invoke(self, ctx: Any) -> Any:
        with failing():
            return super().invoke(ctx)


class _Program(typer.Typer):
    """The app, made safe against odd encodings, TERMINAL_WIDTH and arguments."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):  # its encoding may lack some characters
                stream.reconfigure(errors="backslashreplace")
        if not os.environ.get("TERMINAL_WIDTH", "0").isdecimal():
            del os.environ["TERMINAL_WIDTH"]  # typer would raise
        for text in sys.argv[1:]:
            if any("\udc80" <= char <= "\udcff" for char in text):  # bytes that are not UTF-8
                print_line(f"receiver: {text!r} is not UTF-8", err=True, colour=typer.colors.RED)
                sys.exit(2)
        try:
            return super().__call__(*args, **kwargs)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            print_error(ReceiverError(f"cannot write: {error.strerror}"))
            sys.exit(1)


main = _Program(
    name="receiver",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # rich's own would take [fail] in a text for a style
)


def panel(title: str) -> Callable[..., Callable[[F], F]]:
    """Return a decorator that declares a command in a panel of `--help`."""
    return partial(main.command, rich_help_panel=title)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("prediction-receiver"))
        raise typer.Exit


@main.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Submit predictions, record every outcome exactly once, run your handlers on it."""


@contextmanager
def failing(*kinds: type[Exception]) -> Iterator[None]:
    """On a ReceiverError or one of `kinds`, print it and end the command with exit code 1."""
    caught: tuple[type[Exception], ...] = (ReceiverError, *kinds)
    try:
        yield
    except caught as error:
        print_error(error)
        raise typer.Exit(1) from None


def print_error(error: Exception) -> None:
    """Print the error that ends a command."""
    is_ours = isinstance(error, SettingsError | HandlerError)
    hint = _hint() if isinstance(error, HandlerError) else ""
    print_line(f"receiver: {error}{hint}", lines=is_ours, err=True, colour=typer.colors.RED)


def _hint() -> str:
    """Return a hint if a handler is named like a module but is a file in this folder."""
    for name in (*sys.argv[1:], *os.environ.get("RECEIVER_HANDLERS", "").split(",")):
        if name.isidentifier() and Path(f"{name}.py").is_file():
            return f" ({name}.py is here: name it with its ending)"
    return ""
