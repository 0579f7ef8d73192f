"""Print text and JSON, with unprintable characters escaped.

Whatever is shown comes through here, where all that does not show by itself is spelled out, on a
terminal and in a pipe alike: what a pipe carries is often read on a terminal in the end. JSON
means the same with its characters escaped.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import typer

from receiver.model.text import spelled, spelled_json


def program(folder: Path | None = None) -> str:
    """Return how this program is called again, from this folder or another."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{_called(Path(sys.executable), folder)} -m receiver"
    return _called(called.absolute(), folder)


def _called(file: Path, folder: Path | None) -> str:
    """Name an executable: by its name alone where the shell finds it by that."""
    found = shutil.which(file.name)
    if found is not None and os.path.abspath(found) == str(file):  # noqa: PTH100 - links stay
        return file.name
    near = os.path.relpath(file, folder or Path.cwd())
    return shlex.quote(near if not near.startswith("../..") else str(file))


def print_line(
    text: str, *, lines: bool = False, err: bool = False, colour: str | None = None
) -> None:
    """Print a line, which may quote others; only of what is all ours may line ends be kept."""
    text = "\n".join(map(spelled, text.split("\n"))) if lines else spelled(text)
    typer.secho(text, err=err, fg=colour)


def print_value(value: Any) -> None:
    """Print JSON: in colour and indented on a terminal, on one line in a pipe."""
    from rich.console import Console
    from rich.highlighter import JSONHighlighter

    console = Console()
    if console.is_terminal:
        text = spelled_json(json.dumps(value, ensure_ascii=False, indent=2))
        console.print(JSONHighlighter()(text), soft_wrap=True)
    else:
        print_plainly(value)


def print_plainly(value: Any) -> None:
    """Print JSON on one line."""
    import msgspec

    text = json.dumps(msgspec.to_builtins(value), ensure_ascii=False, separators=(",", ":"))
    typer.echo(spelled_json(text))
