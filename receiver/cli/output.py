"""Print text and JSON, with unprintable characters escaped.

They are escaped in a pipe too, as its content is often shown on a terminal in the end. JSON has the
same meaning with its characters escaped.
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
    """Return the command that calls this program from this folder, or from `folder`."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{_called(Path(sys.executable), folder)} -m receiver"
    return _called(called.absolute(), folder)


def _called(file: Path, folder: Path | None) -> str:
    """Return the name of an executable if the shell finds it by that, else its path."""
    found = shutil.which(file.name)
    if found is not None and os.path.abspath(found) == str(file):  # noqa: PTH100 - keeps links
        return file.name
    near = os.path.relpath(file, folder or Path.cwd())
    return shlex.quote(near if not near.startswith("../..") else str(file))


def print_line(
    text: str, *, lines: bool = False, err: bool = False, colour: str | None = None
) -> None:
    """Print a text on one line; `lines` keeps its line ends, for texts that are all our own."""
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
