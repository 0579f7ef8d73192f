"""The README is held against the code."""

from __future__ import annotations

import inspect
import os
import re
import runpy
import subprocess
import sys
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import pytest

from receiver import create_app
from receiver.deliveries.registry import load
from receiver.settings import Secret, Setting, Settings, all_settings
from tests.patience import PATIENCE

TOP = Path(__file__).parent.parent
README = (TOP / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def settings_table() -> str:
    """Return the README's table of settings, with one line for those of one sentence."""
    lines = ["| Name | Default | |", "|---|---|---|"]
    for says, group in groupby(all_settings(), key=attrgetter("says")):
        found = list(group)
        names = ", ".join(f"`{name}`" for each in found for name in each.names)
        shown = [default_of(each) for each in found]
        lines.append(
            f"| {names} | {', '.join(shown if len({*shown}) > 1 else shown[:1])} | {says} |"
        )
    return "\n".join(lines)


def default_of(setting: Setting) -> str:
    """Return a default as the README writes it."""
    if setting.shown:
        return setting.shown
    match setting.default:
        case bool():
            return "on" if setting.default else "off"
        case int() | float():
            return f"{setting.default:.0f}"
        case str():
            return f"`{setting.default}`"
    return "none"


def test_the_table_of_settings_is_the_one_that_is_read() -> None:
    table = README.partition("## Settings")[2].partition("## Deploy")[0]
    assert settings_table() in table


def test_a_sentence_of_a_setting_is_said_in_one_line() -> None:
    says = [says for says, _ in groupby(all_settings(), key=attrgetter("says"))]
    assert len(says) == len(set(says))


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
