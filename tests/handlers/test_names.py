"""All built-in handlers are named consistently and documented."""

from __future__ import annotations

import tomllib
from typing import Final

from tests.handlers.parts import HANDLERS

FILES: Final = {
    path.stem.replace("_", "-"): path
    for path in sorted(HANDLERS.glob("*.py"))
    if not path.stem.startswith("_")  # modules that several handlers share
}
NAMES: Final = sorted(FILES)
PAGE: Final = (HANDLERS.parent / "deploy" / "handlers.md").read_text()


def test_built_in_handlers_are_entry_points() -> None:
    project = tomllib.loads((HANDLERS.parent / "pyproject.toml").read_text())["project"]
    offered = project["entry-points"]["receiver.handlers"]
    assert offered == {name: f"receiver_handlers.{FILES[name].stem}" for name in NAMES}


def test_built_in_handlers_are_registered_under_their_file_names() -> None:
    for name in NAMES:
        text, way_in = FILES[name].read_text(), f'@route("{name.removesuffix("-in")}"'
        assert f'name="{name}"' in text or way_in in text, name


def test_built_in_handlers_are_documented_with_their_settings() -> None:
    table = PAGE.partition("## Built-in handlers")[2].partition("\n## ")[0]
    for name in NAMES:
        [row] = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"`{name.upper().removesuffix('-IN')}" in row or name == "log", name
