"""The README and the pages in `deploy/` agree with the code, and their commands work."""

from __future__ import annotations

import inspect
import json
import os
import re
import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Final
from xml.etree import ElementTree as ET

import pytest

from receiver import create_app
from receiver.cli import demo
from receiver.cli.emulating import emulated
from receiver.cli.emulating import environment as among_emulated
from receiver.cli.init import next_commands
from receiver.emulator import chat_settings_for
from receiver.providers import DECLARED
from receiver.settings import Secret, Settings, all_settings
from tests.cli.running import SECRET, environment, inside
from tests.demo import PICTURE, words
from tests.loopback import free_port, is_ready
from tests.patience import PATIENCE
from tests.settings_table import settings_table
from tests.shell import bash
from tests.typed import check_types

TOP: Final = Path(__file__).parent.parent
PAGES: Final = {
    path.name: path.read_text()
    for path in [TOP / "README.md", *sorted((TOP / "deploy").glob("*.md"))]
}
KEY: Final = "the-key-of-the-pages"
TRIGGERS: Final = {
    "RECEIVER_RECIPES": "recipes.toml",
    "TRIGGERS": "triggers.toml",
    **dict.fromkeys(("TIMER_SECRET", "RELEASES_SECRET", "N8N_SECRET"), "a-secret-of-the-pages"),
    "HOOKS_SECRET": "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
}
"""The environment that the page about automation sets."""
NOT_RUN: Final = {
    "make demo": "sets up an environment; tests/cli runs the demo, and this is the suite",
    "python3 -m venv": "downloads some forty packages",
    "pip install -c constraints.txt '.[postgres]'": "downloads; tests/journey has the rest",
    "pip install -c constraints.txt '.[otel]'": "downloads; tests/observability has the rest",
    "export PGDSN": "PgQueuer's own tools, which redraw a screen until they are stopped",
    "pip wheel --no-deps --wheel-dir": "copies out of a clone; tests/deploy has the files",
    "set -a; . ./.env": "wants a PostgreSQL of its reader's; tests/store migrates",
    "sh build.sh": "downloads, and wants an account at AWS",
    "export RECEIVER_URL=https://abc123": "wants an account at AWS",
    "systemctl stop": "stops a service of the system; tests/store/test_backup.py restores",
}
"""The blocks of commands that are not run, by how they begin, and why."""


@dataclass(frozen=True)
class Block:
    """A fenced code block of a page."""

    page: str
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}: {self.text.partition(chr(10))[0]}"

    @property
    def file(self) -> str | None:
        """The file name in the first line of a Python or TOML block, if there is one."""
        named = re.match(r"# (\w+\.(?:py|toml))\n", self.text)
        return named[1] if named and self.language in {"python", "toml"} else None

    @property
    def serves(self) -> bool:
        """Whether its last command runs until it is stopped."""
        return re.search(r"^(receiver serve|uvicorn) .*\n\Z", self.text, re.MULTILINE) is not None


BLOCKS: Final = [
    Block(page, language, block)
    for page, text in PAGES.items()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
]
PYTHON: Final = [block for block in BLOCKS if block.language == "python"]
COMMANDS: Final = [block for block in BLOCKS if block.language == "sh"]
TO_RUN: Final = [block for block in COMMANDS if not block.text.startswith(tuple(NOT_RUN))]


def named(block: Block) -> str:
    return block.name


# --- what the pages say ---


def test_settings_page_has_the_current_settings_table() -> None:
    assert settings_table() in PAGES["settings.md"]


def test_settings_command_lists_all_settings_and_help_names_it(tmp_path: Path) -> None:
    shown = inside("settings", cwd=tmp_path).stdout
    listed = [
        json.loads(line) for line in inside("settings", "--json", cwd=tmp_path).stdout.splitlines()
    ]
    names = [name for each in all_settings() for name in each.names]
    assert [row["name"] for row in listed] == names
    assert all(re.search(rf"\b{name}\b", shown) for name in names)
    assert not re.search(r"`|\]\(", shown)  # no Markdown in the terminal
    [key] = [row for row in listed if row["name"] == "RECEIVER_SECRET_KEY"]
    assert (key["default"], key["about"].partition(";")[0]) == ("required", "32 characters or more")
    assert "receiver settings" in inside("serve", "--help", cwd=tmp_path).stdout


def test_settings_with_the_same_description_are_adjacent() -> None:
    sentences = [doc for doc, _ in groupby(all_settings(), key=attrgetter("doc"))]
    assert len(sentences) == len(set(sentences))


def test_every_route_is_on_the_routes_page(tmp_path: Path) -> None:
    settings = Settings.read(
        {
            "RECEIVER_SECRET_KEY": "x" * 32,
            "RECEIVER_DATABASE_URL": f"sqlite:///{tmp_path / 'docs.db'}",
        }
    )
    assert isinstance(settings.secret_keys[0], Secret)
    section = PAGES["routes.md"].partition("## HTTP")[2].partition("## Commands")[0]
    for route in create_app(settings).routes:
        path = getattr(route, "path", "").replace(":path", "")
        tail = "/".join(path.split("/")[-1:])
        assert path in section or f"…/{tail}" in section, path


def test_every_command_is_on_the_routes_page() -> None:
    section = PAGES["routes.md"].partition("## Commands")[2]
    listed = inside("--help", cwd=TOP).stdout
    names = re.findall(r"^│ ([a-z]+) ", listed, re.MULTILINE)
    assert "serve" in names
    for name in names:
        assert re.search(rf"`(receiver )?{name}\b", section), name


@pytest.mark.parametrize("name", DECLARED)
@pytest.mark.parametrize("page", ["README.md", "providers.md"])
def test_every_provider_has_a_table_row(page: str, name: str) -> None:
    row = rf"^\|.* `{name}` \| `{DECLARED[name].key}` \| [^|]"
    assert len(re.findall(row, PAGES[page], re.MULTILINE)) == 1


@pytest.mark.parametrize("page", PAGES)
def test_every_relative_link_has_a_target(page: str) -> None:
    home = TOP if page == "README.md" else TOP / "deploy"
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[page]):
        path, _, anchor = target.partition("#")
        assert (home / path).exists(), target
        heads = re.findall(r"^#+ (.*)$", (home / path).read_text(), re.MULTILINE) if anchor else []
        slugs = {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}
        assert not anchor or anchor in slugs, target


def test_readme_is_short_and_its_picture_small_and_self_contained() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 150
    picture = PICTURE.read_text()
    assert len(picture.encode()) < 40_000
    assert ET.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"
    assert re.findall(r"https?://[^\"]*", picture) == ["http://www.w3.org/2000/svg"]


def test_picture_shows_the_current_demo() -> None:
    shown = words(PICTURE.read_text())
    for _, _, given, note in demo.SEEDS:
        assert given["prompt"].partition(" [")[0] in shown
        assert note in shown
    ways = [*demo.PROOFS.values(), "a poll, as no callback came", "a forged callback was refused"]
    for said in (*ways, "what happens", f"receiver init {demo.PROJECT}"):
        assert said in shown
    serve = next_commands(Path(demo.PROJECT))[0].partition(" serve ")[2]
    assert f"cd {demo.PROJECT} && receiver serve {serve}" in shown


# --- blocks of Python ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write the blocks that name a file, and what `receiver init` writes."""
    write_files(tmp_path)
    recipes = next(b.text for b in BLOCKS if (b.page, b.language) == ("recipes.md", "toml"))
    (tmp_path / "recipes.toml").write_text(recipes)
    assert inside("init", cwd=tmp_path).returncode == 0
    (tmp_path / ".env").unlink()
    return tmp_path


def write_files(folder: Path, page: str | None = None) -> None:
    """Write the files of all pages, or of one page, as two pages may use the same file name."""
    for block in BLOCKS:
        if block.file and page in {None, block.page}:
            (folder / block.file).write_text(block.text)


@pytest.mark.parametrize("block", PYTHON, ids=named)
def test_every_python_block_runs(
    block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = folder / "block.py"
    script.write_text(block.text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("SHOP_SECRET", "what-shop.py-of-the-plugins-page-wants")
    made = runpy.run_path(str(script))
    for name, value in made.items():
        if name.startswith("test_") and not inspect.signature(value).parameters:
            value()


def test_python_blocks_pass_strict_mypy(tmp_path: Path) -> None:
    for number, block in enumerate(PYTHON):
        file = tmp_path / (block.file or f"block{number}.py")
        assert not file.exists(), "two blocks are one file"
        file.write_text(block.text)
    check_types(tmp_path)


def test_block_languages_and_skipped_commands_are_known() -> None:
    assert {block.language for block in BLOCKS} == {"", "python", "sh", "nginx", "toml"}
    for start in NOT_RUN:
        assert any(block.text.startswith(start) for block in COMMANDS), start


# --- blocks of commands ---


@pytest.fixture(scope="module")
def providers() -> Iterator[str]:
    with emulated(0.1, "http://localhost:8000") as url:
        yield url


def environment_of(providers: str, port: int) -> dict[str, str]:
    """Return the environment of a user with the program on PATH and keys of emulated providers."""
    env = environment(
        {
            **among_emulated(providers, f"http://127.0.0.1:{port}"),
            **chat_settings_for(providers),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RECEIVER_SECRET_KEY": SECRET,
            "RECEIVER_API_KEYS": KEY,
            "RECEIVER_API_KEY": KEY,
            **TRIGGERS,
            "RECEIVER_URL": f"http://127.0.0.1:{port}",
        }
    )
    for name in [name for name in env if name.startswith(("PYTEST_", "COV_"))]:
        del env[name]
    # Without pytest plugins that a reader does not have, which are slow to load.
    return env | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "-p receiver.testing.plugin",
    }


@contextmanager
def serving(commands: str, cwd: Path, env: dict[str, str], port: int) -> Iterator[None]:
    """Run commands of which the last serves; yield once it is ready, and stop it afterwards."""
    log = cwd / "serve.log"
    with bash(commands, cwd, env, log) as server:
        ends = time.monotonic() + PATIENCE
        base = f"http://127.0.0.1:{port}"
        while not is_ready(f"{base}/readyz", f"{base}/predictions/readyz"):  # the second if mounted
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.05)
        yield


@pytest.fixture(scope="module")
def there(providers: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Yield an environment in which commands reach a running receiver."""
    port = free_port()
    env = environment_of(providers, port)
    home = tmp_path_factory.mktemp("receiver")
    write_files(home)
    with serving(f"receiver serve log trigger-in --port {port}", home, env, port):
        yield env


@pytest.mark.parametrize("block", [block for block in TO_RUN if block.serves], ids=named)
def test_every_serving_command_becomes_ready(block: Block, folder: Path, providers: str) -> None:
    port = free_port()  # not the written one, as other tests run at the same time
    write_files(folder, block.page)
    env = environment_of(providers, port) | {"RECEIVER_RECIPES": str(folder / "recipes.toml")}
    text = re.sub(r" --(host|port) \S+", "", block.text)
    text = re.sub(r"^(receiver serve|uvicorn) ", rf"\1 --port {port} ", text, flags=re.MULTILINE)
    with serving(text, folder, env, port):
        pass


@pytest.mark.parametrize("block", [block for block in TO_RUN if not block.serves], ids=named)
def test_every_other_command_succeeds(block: Block, folder: Path, there: dict[str, str]) -> None:
    log = folder / "commands.log"
    # pytest is installed already.
    with bash(block.text.replace("pip install pytest && ", ""), folder, there, log) as commands:
        assert commands.wait(PATIENCE) == 0, log.read_text()
