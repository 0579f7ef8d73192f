"""Files from elsewhere are what they say they are, and they come with the wheel."""

from __future__ import annotations

import hashlib
import tomllib
from importlib.resources import files
from typing import Any

import pytest

STATIC = files("receiver.dashboard").joinpath("static")
VENDORED: dict[str, dict[str, Any]] = tomllib.loads(STATIC.joinpath("vendored.toml").read_text())


@pytest.mark.parametrize("name", VENDORED)
def test_a_file_from_elsewhere_is_as_it_was_published(name: str) -> None:
    said = VENDORED[name]
    assert hashlib.sha256(STATIC.joinpath(name).read_bytes()).hexdigest() == said["sha256"]
    assert said["licence"] == "0BSD"
    assert {"package", "version", "path"} <= said.keys()


def test_nothing_else_is_from_elsewhere() -> None:
    scripts = {each.name for each in STATIC.iterdir() if each.name.endswith(".js")}
    assert scripts == {*VENDORED, "ui.js"}
    assert b"sourceMappingURL" not in b"".join(
        STATIC.joinpath(each).read_bytes() for each in scripts
    )
