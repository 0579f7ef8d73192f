"""Draw the README's picture of the demo from the screen of a real run: `make docs`."""

from __future__ import annotations

import contextlib
import html
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Final

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from receiver.cli import demo

PICTURE: Final = Path(__file__).parent.parent / "deploy" / "demo.svg"
_WIDTH: Final = 106
# No external font and no comment, so that the picture is self-contained.
_FORMAT: Final = re.sub(
    r"@font-face \{\{.*?\}\}|<!--.*?-->", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL
)


def draw() -> str:
    """Run the demo in a temporary folder, as a user calls it, and return its screen as SVG."""
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), color_system="truecolor")
    sys.argv[0] = str(Path(sys.executable).with_name("receiver"))
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as home, contextlib.chdir(home):
        if demo.run("receiver-demo", 1.0, console):
            raise SystemExit("the demo has failed, and is not drawn")
    drawn = console.export_svg(title="receiver demo", code_format=_FORMAT, unique_id="demo")
    return "".join(f"{line.rstrip()}\n" for line in drawn.splitlines())


def words(picture: str) -> str:
    """Return the text of a picture, with single blanks."""
    texts = re.findall(r"<text[^>]*>(.*?)</text>", picture)
    return " ".join(" ".join(map(html.unescape, texts)).split())


if __name__ == "__main__":
    PICTURE.write_text(draw())
