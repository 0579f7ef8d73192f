"""The README is held against the code."""

from __future__ import annotations

import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from receiver import create_app
from receiver.deliveries.registry import load
from receiver.settings import Secret, Settings
from tests.patience import PATIENCE

TOP = Path(__file__).parent.parent
README = (TOP / "README.md").read_text()
SETTINGS = "".join(path.read_text() for path in (TOP / "receiver/settings").glob("*.py"))
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_every_setting_that_is_read_is_in_the_table() -> None:
    for name in set(re.findall(r'"(RECEIVER_[A-Z_]+)"', SETTINGS)):
        group, _, last = name.rpartition("_")
        assert name in README or (group in README and f"`_{last}`" in README), name


def test_every_setting_of_the_table_is_read() -> None:
    table = README.partition("## Settings")[2].partition("## Deploy")[0]
    for name in re.findall(r"`(RECEIVER_[A-Z_]+)`", table):
        assert f'"{name}"' in SETTINGS, name


def test_every_route_of_the_app_is_in_the_readme(tmp_path: Path) -> None:
    settings = Settings.read(
        {
            "RECEIVER_SECRET_KEY": "x" * 32,
            "RECEIVER_DATABASE_URL": f"sqlite:///{tmp_path / 'docs.db'}",
        }
    )
    assert isinstance(settings.secret_keys[0], Secret)
    section = README.partition("## HTTP")[2].partition("## Commands")[0]
    for route in create_app(settings).routes:
        path = getattr(route, "path", "").replace(":path", "")
        tail = "/".join(path.split("/")[-1:])
        assert path in section or f"…/{tail}" in section, path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write down the blocks that say what file they are."""
    for block in PYTHON:
        if named := re.match(r"# (\w+\.py)\n", block):
            (tmp_path / named[1]).write_text(block)
    return tmp_path


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_every_python_block_runs(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = folder / f"block{number}.py"
    script.write_text(PYTHON[number])
    monkeypatch.syspath_prepend(folder)
    made = runpy.run_path(str(script))
    for name, value in made.items():
        if name.startswith("test_") and not inspect.signature(value).parameters:
            value()


def test_the_recipe_works_as_it_is_written(folder: Path) -> None:
    recipe = README.partition("### Write your own in five minutes")[2].partition("\n### ")[0]
    [commands] = re.findall(r"```sh\n(.*?)```", recipe, re.DOTALL)
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name in [name for name in here if name.startswith(("PYTEST_", "COV_"))]:
        del here[name]
    here["PYTEST_ADDOPTS"] = "-p no:schemathesis"  # a plugin by itself, and slow to load
    ran = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=folder,
        env=here,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "4 passed" in ran.stdout


def test_the_recipe_can_be_served(folder: Path) -> None:
    assert list(load([str(folder / "thanks.py")]).handlers) == ["thanks"]
