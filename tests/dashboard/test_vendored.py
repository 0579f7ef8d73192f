"""Vendored files are unmodified, and all of them are listed."""

from __future__ import annotations

import hashlib
import tomllib
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import pytest

STATIC = files("receiver.dashboard").joinpath("static")
HERE = Path(__file__).parent


@pytest.mark.parametrize(("folder", "count"), [(STATIC, 2), (HERE, 1)])
def test_vendored_files_match_their_published_hashes(folder: Traversable, count: int) -> None:
    vendored = tomllib.loads(folder.joinpath("vendored.toml").read_text())
    assert len(vendored) == count
    for name, said in vendored.items():
        assert hashlib.sha256(folder.joinpath(name).read_bytes()).hexdigest() == said["sha256"]
        assert {"package", "version", "path", "licence"} <= said.keys()


def test_every_script_except_ui_js_is_listed_as_vendored() -> None:
    vendored = tomllib.loads(STATIC.joinpath("vendored.toml").read_text())
    scripts = {each.name for each in STATIC.iterdir() if each.name.endswith(".js")}
    assert scripts == {*vendored, "ui.js"}
