"""What commands show.

Whatever is shown comes through here, where all that does not show by itself is spelled out, on a
terminal and in a pipe alike: what a pipe carries is often read on a terminal in the end. JSON
means the same with its characters escaped.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import typer
from rich.text import Text

from receiver.model.text import spelled, spelled_json

_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?Z", re.ASCII)
_WHOLE: Final = re.compile(f"(pred|evt|dlv|rep)_[0-9a-z]+|{_TIME.pattern}", re.ASCII)
"""What is never broken: ids are there to be copied."""
_NARROWEST: Final = 8
"""Characters to which a column may be squeezed for the sake of those."""


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


def say(text: str, *, lines: bool = False, err: bool = False, colour: str | None = None) -> None:
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


def print_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print a table; its ids and times stay whole, in however narrow a terminal."""
    from rich.console import Console
    from rich.table import Column, Table

    cells = [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [
        max((len(line[place]) for line in cells if _WHOLE.fullmatch(line[place].plain)), default=0)
        for place in range(len(columns))
    ]
    heads = [
        Column(name, min_width=width or None, no_wrap=bool(width), overflow="fold")
        for name, width in zip(columns, widths, strict=True)
    ]
    needed = sum((width or _NARROWEST) + 2 for width in widths)
    table = Table(*heads, box=None, header_style="bold")
    for line in cells:
        table.add_row(*line)
    console = Console()
    # A pipe has no width, whatever it pretends.
    Console(width=max(console.width, needed) if console.is_terminal else 240).print(table)


def shown(text: Any, style: str = "") -> Text:
    """Make others' words fit for rich: nothing in them is markup, and nothing acts."""
    return Text(spelled(str(text)), style)


def cell(value: Any) -> Text:
    """Show a value of a table."""
    if isinstance(value, dict) and "code" in value:  # an error
        value = f"{value.get('code')}: {value.get('message')}"
    elif isinstance(value, dict):
        value = ", ".join(f"{name}={inner}" for name, inner in value.items())
    text = "" if value is None else str(value)
    time = _TIME.fullmatch(text)
    return shown(f"{time[1]}Z" if time else text)
