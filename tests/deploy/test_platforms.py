"""The platform files in `deploy/` are valid, and refer only to things that exist."""

from __future__ import annotations

import ast
import gc
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import pytest
import typer
import yaml  # type: ignore[import-untyped] # stubs are not worth a package
from starlette.applications import Starlette

from receiver import create_app
from receiver.cli.commands import main
from receiver.settings import Settings, all_settings
from tests.cli.running import SECRET, environment, receiver
from tests.loopback import free_port, is_ready
from tests.patience import PATIENCE
from tests.postgres import Database

DEPLOY: Final = Path(__file__).parent.parent.parent / "deploy"
BIN: Final = Path(sys.executable).parent
FOLDERS: Final = (
    "azure",
    "cloudrun",
    "compose",
    "docker",
    "fly",
    "heroku",
    "kubernetes",
    "lambda",
    "modal",
    "railway",
    "render",
    "supabase",
    "vercel",
)
FILES: Final = [
    path
    for folder in FOLDERS
    for path in sorted((DEPLOY / folder).rglob("*"))
    if path.is_file() and "__pycache__" not in path.parts
]


ROUTE: Final = r"""(?<![\w/}])(?:https?://[\w.:-]+|\$RECEIVER_URL)?(/(?:v1/[a-z/]+|wake/|health\w*|ready\w*))"""


def named(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


def test_deploy_has_exactly_the_known_folders() -> None:
    told_elsewhere = {"automation", "editable", "grafana", "prometheus", "systemd", "typescript"}
    assert {path.name for path in DEPLOY.iterdir() if path.is_dir()} == {*FOLDERS, *told_elsewhere}


def test_systemd_units_share_one_state_directory_and_user() -> None:
    units = [
        dict(re.findall(r"^(\w+)=(.*)$", path.read_text(), re.MULTILINE))
        for path in sorted((DEPLOY / "systemd").iterdir())
    ]
    assert [(unit["StateDirectory"], unit["DynamicUser"], unit["User"]) for unit in units] == [
        ("receiver", "yes", "receiver")
    ] * 2


def test_each_file_begins_with_what_was_tried() -> None:
    for path in FILES:
        if path.suffix == ".json" or path.name.startswith("."):
            continue  # it has no such comment; the files beside it have
        first = path.read_text().split("\n", 2)
        line = first[1] if first[0].startswith("#!") else first[0]
        assert re.match(r'(#|--|""")\s?Tried here: ', line), (named(path), line)


# --- the files are valid ---

PROCFILE: Final = (DEPLOY / "heroku" / "Procfile").read_text()
DOCKERFILE: Final = (DEPLOY / "docker" / "Dockerfile").read_text()
PARSERS: Final[Mapping[str, Callable[[str], Any]]] = {
    ".json": json.loads,
    ".toml": tomllib.loads,
    ".py": ast.parse,
    ".yaml": lambda text: list(yaml.safe_load_all(text)),
}
PARSED: Final = {
    named(path): PARSERS[path.suffix](path.read_text())
    for path in FILES
    if path.suffix in PARSERS and path.parent.name != "lambda"
}
"""All but Lambda's template, whose YAML has custom tags; cfn-lint reads that one."""


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".sh"], ids=named)
def test_shell_script_has_valid_syntax_and_is_executable(path: Path) -> None:
    assert subprocess.run(["sh", "-n", path], check=False).returncode == 0
    assert os.access(path, os.X_OK)


def test_sam_template_passes_cfn_lint() -> None:
    ran = subprocess.run(
        [BIN / "cfn-lint", DEPLOY / "lambda" / "template.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_compose_files_match_the_compose_schema(tmp_path: Path) -> None:
    assert receiver("init", cwd=tmp_path).returncode == 0
    files = [DEPLOY / "compose" / "compose.yaml", tmp_path / "compose.yaml"]
    schema = ["--builtin-schema", "vendor.compose-spec"]
    ran = subprocess.run(
        [BIN / "check-jsonschema", *schema, *files], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_kubernetes_containers_are_not_root_and_have_read_only_filesystems() -> None:
    whole = PARSED["kubernetes/kustomization.yaml"][0]
    for name in (*whole["resources"], "drain.yaml"):
        (pod,) = pods(PARSED[f"kubernetes/{name}"])
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["runAsNonRoot"] is True
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        # The later one wins: .env has the path of the handlers in its own folder, not the pod's.
        assert [*map(list, container["envFrom"])] == [["secretRef"], ["configMapRef"]]


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Yield everything that holds containers."""
    if isinstance(value, dict) and "containers" in value:
        yield value
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from pods(each)


# --- the names in the files exist ---


def test_every_setting_in_the_files_is_known() -> None:
    known = {name for each in all_settings() for name in each.names}
    setting = re.compile(r"\b(RECEIVER_[A-Z_]+|[A-Z]+_(?:API_)?KEY|CRON_SECRET)\b")
    said = {named(path): {*setting.findall(path.read_text())} for path in FILES}
    assert {file: names - known for file, names in said.items() if names - known} == {}
    found = {name for names in said.values() for name in names}
    assert found >= {"RECEIVER_SECRET_KEY", "RECEIVER_DATABASE_URL", "CRON_SECRET", "FAL_KEY"}


def test_every_route_in_the_files_is_served(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'deploy.db'}"
    app = create_app(Settings.read({"RECEIVER_SECRET_KEY": SECRET, "RECEIVER_DATABASE_URL": url}))
    served = {getattr(route, "path", "").partition("{")[0] for route in app.routes}
    said = {named(path): re.findall(ROUTE, path.read_text()) for path in FILES}
    found = {route for routes in said.values() for route in routes}
    assert found <= served, said
    assert found >= {"/v1/drain", "/wake/", "/health", "/ready"}


@pytest.mark.parametrize("module", ["asgi:app", "aws:handler", "azure:app"])
def test_every_entry_point_in_the_files_exists(module: str) -> None:
    name, _, what = module.partition(":")
    text = "".join(path.read_text() for path in FILES)
    assert f"receiver.{name} import {what}" in text or f"receiver.{name}.{what}" in text
    spec = find_spec(f"receiver.{name}")
    assert spec is not None
    assert spec.origin is not None
    assert re.search(rf"^(def )?{what}\b", Path(spec.origin).read_text(), re.MULTILINE)


@patch.dict(os.environ)  # restores the variables that an entry point sets
def test_vercel_and_azure_entry_points_create_an_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECEIVER_SECRET_KEY", SECRET)
    monkeypatch.setenv("RECEIVER_DATABASE_URL", "postgresql://nobody@db-pooler.invalid/receiver")
    for name in ("receiver.asgi", "receiver.azure"):  # as in a new process
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert isinstance(runpy.run_path(str(DEPLOY / "vercel/api/index.py"))["app"], Starlette)
    azure = runpy.run_path(str(DEPLOY / "azure/function_app.py"))["app"].get_functions()
    assert "drain" in {each.get_function_name() for each in azure}
    del azure
    sys.modules.pop("receiver.azure", None)
    gc.collect()  # the library's app ends by its own event loop, which must not run inside another


def commands() -> Iterator[str]:
    """Yield every command that a file runs, as a line."""
    for value in PARSED.values():
        yield from (text for text in strings(value) if text.startswith("receiver "))
        for pod in pods(value):
            for container in pod["containers"]:
                yield shlex.join([*container["command"], *container.get("args", [])])
    yield from re.findall(r"^\w+: .*(receiver .*)$", PROCFILE, re.MULTILINE)
    for text in re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE):
        yield shlex.join(json.loads(text))


def strings(value: Any) -> Iterator[str]:
    """Yield every text in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


COMMANDS: Final = sorted(set(commands()))


def test_commands_are_found_in_the_files() -> None:
    assert {"receiver migrate", "receiver serve", "receiver worker"} < set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_the_files_is_valid(command: str) -> None:
    group = typer.main.get_command(main)
    program, *arguments = shlex.split(command)
    assert program == "receiver"
    context = group.make_context(program, arguments)
    assert isinstance(group, typer.core.TyperGroup)
    name, found, rest = group.resolve_command(context, arguments)
    assert found is not None
    with found.make_context(name, list(rest), parent=context):
        pass


# --- some files can run here ---


def test_procfile_web_process_listens_on_port(database: Database, tmp_path: Path) -> None:
    lines = dict(line.split(": ", 1) for line in PROCFILE.splitlines()[1:])
    assert set(lines) == {"release", "web", "worker"}
    port = free_port()
    env = environment(
        {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RECEIVER_SECRET_KEY": SECRET,
            "DATABASE_URL": database.url,
            "PORT": str(port),
        }
    )
    released = subprocess.run(
        ["sh", "-c", lines["release"]], cwd=tmp_path, env=env, capture_output=True, check=False
    )
    assert released.returncode == 0, released.stderr
    log = tmp_path / "web.log"
    with log.open("wb") as out:
        web = subprocess.Popen(
            ["sh", "-c", f"exec env {lines['web']}"], cwd=tmp_path, env=env, stdout=out, stderr=out
        )
    try:
        ends = time.monotonic() + PATIENCE
        while not is_ready(f"http://127.0.0.1:{port}/ready"):
            assert web.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.02)
    finally:
        web.send_signal(signal.SIGTERM)
        web.wait(PATIENCE)


@pytest.mark.parametrize("is_there", [False, True])
def test_cloud_run_schedule_calls_the_drain_with_the_cron_secret(
    tmp_path: Path, *, is_there: bool
) -> None:
    log = tmp_path / "calls"
    stand_in = tmp_path / "gcloud"
    stand_in.write_text(
        f'#!/bin/sh\n[ "$3" = describe ] && exit {int(not is_there)}\nprintf "%s\\n" "$@" > {log}\n'
    )
    stand_in.chmod(0o755)
    told = {
        "RECEIVER_URL": "https://receiver.example",
        "RECEIVER_CRON_SECRET": "cron key",
        "REGION": "europe-west1",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    subprocess.run(["sh", DEPLOY / "cloudrun" / "schedule.sh"], env=told, check=True)
    called = log.read_text().splitlines()
    assert called[2] == ("update" if is_there else "create")
    assert "https://receiver.example/v1/drain?seconds=50" in called
    headers = called.index("--update-headers" if is_there else "--headers")
    assert called[headers + 1] == "Authorization=Bearer cron key"
