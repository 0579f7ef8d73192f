"""`receiver init` makes a project whose next commands work, and replaces no existing file."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import yaml  # type: ignore[import-untyped] # stubs are not worth a package

from tests.cli.running import environment, inside, receiver
from tests.loopback import free_port
from tests.patience import PATIENCE
from tests.typed import check_types

BIN = Path(sys.executable).parent
TEXT_TEST = """
from my_handlers import announce
from receiver import Output
from receiver.testing import make_event


def test_text_output_is_announced(receiver_kit, capsys):
    ran = receiver_kit(announce).deliver(make_event("succeeded", output=[Output(text="a poem")]))
    assert (ran.delivery.state, "made a poem" in capsys.readouterr().out) == ("done", True)
"""


def installed() -> dict[str, str]:
    """Return the environment of a user with the program on PATH."""
    env = environment({"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"})
    for name in [name for name in env if name.startswith(("PYTEST_", "COV_"))]:
        del env[name]
    return env


def bash(command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command],
        cwd=cwd,
        env={**installed(), **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_both_printed_next_commands_work(tmp_path: Path) -> None:
    made = bash("receiver init 'my shop'", tmp_path)
    assert made.returncode == 0, made.stderr
    serve, submit = re.findall(r"^  (.*)$", made.stdout, re.MULTILINE)
    assert serve.startswith("cd 'my shop' && receiver serve ")
    there = inside("init", cwd=tmp_path / "my shop").stdout
    assert re.findall(r"^  \S+ (.*)$", there, re.MULTILINE) == [
        serve.partition("&& receiver ")[2],
        submit.partition("receiver ")[2],
    ]
    port = free_port()  # not the printed one, as other tests run at the same time
    log = tmp_path / "serve.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            ["bash", "-c", f"{serve} --port {port}"],
            cwd=tmp_path,
            env=installed(),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        ends = time.monotonic() + PATIENCE
        while log.read_text().count("attempt 1: ") < 3:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            time.sleep(0.02)
        done = bash(submit, tmp_path, RECEIVER_URL=f"http://127.0.0.1:{port}")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(PATIENCE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "succeeded"
    assert "fal-ai/nano-banana made http://127.0.0.1:" in log.read_text()


def test_generated_project_passes_its_test_and_hides_its_secrets(tmp_path: Path) -> None:
    assert receiver("init", cwd=tmp_path).returncode == 0
    check_types(tmp_path)
    (tmp_path / "test_text.py").write_text(TEXT_TEST)
    ran = bash("pytest -q -p no:schemathesis -p no:xdist -p no:randomly", tmp_path)
    (tmp_path / "test_text.py").unlink()
    assert ran.returncode == 0, ran.stdout
    assert "2 passed" in ran.stdout
    secrets = (tmp_path / ".env").read_text()
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert re.search(r"^RECEIVER_SECRET_KEY=[0-9a-f]{64}$", secrets, re.MULTILINE)
    assert re.search(r"^RECEIVER_API_KEYS=[0-9a-f]{32}$", secrets, re.MULTILINE)
    ignored = bash("git init -q . && git status --short --untracked-files=all", tmp_path).stdout
    assert sorted(line[3:] for line in ignored.splitlines()) == [
        ".dockerignore",
        ".gitignore",
        "Dockerfile",
        "compose.yaml",
        "my_handlers.py",
        "requirements.txt",
        "test_my_handlers.py",
    ]
    service = yaml.safe_load((tmp_path / "compose.yaml").read_text())["services"]["receiver"]
    assert service["env_file"] == ".env"
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    checked = receiver("doctor", "--dev", cwd=tmp_path)
    assert "reads like a placeholder" not in checked.stdout


def test_init_never_overwrites_existing_files(tmp_path: Path) -> None:
    (tmp_path / "my_handlers.py").write_text("mine\n")
    (tmp_path / ".gitignore").symlink_to("nowhere")
    first = inside("init", cwd=tmp_path)
    assert "made: test_my_handlers.py, .env, requirements.txt, Dockerfile, compose" in first.stdout
    assert "kept as it was: my_handlers.py, .gitignore\n" in first.stdout
    assert "add .env to your .gitignore" in first.stdout
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    again = inside("init", cwd=tmp_path)
    assert again.returncode == 0
    assert "made" not in again.stdout
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == before
    assert before["my_handlers.py"] == b"mine\n"


def test_folder_that_cannot_be_created_exits_1_without_traceback(tmp_path: Path) -> None:
    done = inside("init", "/dev/null/x", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("receiver: ")
    assert "Traceback" not in done.stderr
