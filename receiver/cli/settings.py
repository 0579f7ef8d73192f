"""`receiver settings`: the table of `deploy/settings.md`, for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Final

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from receiver.cli.output import print_plainly
from receiver.settings import all_settings

_LINK: Final = re.compile(r"\[([^\]]*)\]\([^)]*\)")


def settings(*, as_json: bool) -> None:
    """Print every setting with its default and its description, as text or as JSON lines."""
    if as_json:
        for row in _rows():
            print_plainly(row)
        return
    console = Console(highlight=False)
    for about, group in groupby(_rows(), key=itemgetter("about")):
        for row in group:
            line = Text(row["name"], "bold") + Text(f"  {row['default']}", "dim")
            console.print(line, soft_wrap=True)
        console.print(Padding(Text(about), (0, 0, 1, 4)))


def _rows() -> Iterator[dict[str, str]]:
    for each in all_settings():
        for name in each.names:
            yield {"name": name, "default": _plain(each.default_shown), "about": _plain(each.doc)}


def _plain(markdown: str) -> str:
    return _LINK.sub(r"\1", markdown).replace("`", "")
