"""Helpers that run the program as a user does: real processes, sockets and exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from unittest.mock import patch

from typer.testing import CliRunner, Result

from receiver.cli.commands import main
from tests.commands import COMMANDS
from tests.forked import Forked, run_to_end
from tests.loopback import free_port
from tests.patience import PATIENCE

SECRET: Final = "a-secret-key-of-more-than-thirty-two-characters"


def environment(more: dict[str, str]) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RECEIVER_", "OXEN_", "EACHLABS_", "FAL_"))
    }
    return {
        **kept,
        "PYTHONPATH": str(Path(__file__).parent.parent.parent),
        "COLUMNS": "200",
        **more,
    }


def receiver(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end in a separate process."""
    return run_to_end(["-m", "receiver", *args], cwd, environment(env))


def from_scratch(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a new Python interpreter, for tests of the startup itself."""
    return subprocess.run(
        [sys.executable, "-m", "receiver", *args],
        cwd=cwd,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def invoke(*args: str, **env: str) -> Result:
    """Run a command with Typer's runner."""
    with patch("typer.testing._get_command", COMMANDS):
        return CliRunner().invoke(main, args, env=env)


def inside(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a client command in this process: a new process costs far more."""
    with chdir(cwd), patch.dict(os.environ, environment(env), clear=True):
        result = invoke(*args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(args, result.exit_code, result.stdout, result.stderr)


@dataclass
class Running:
    """A running server, and its log."""

    process: Forked
    log: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def said(self) -> str:
        return self.log.read_text()

    def wait_for(self, *texts: str, times: int = 1) -> str:
        """Wait until its log contains all of these texts; return the log."""
        ends = time.monotonic() + PATIENCE
        while any((said := self.said()).count(text) < times for text in texts):
            assert time.monotonic() < ends, said
            assert self.process.poll() is None, said
            time.sleep(0.02)
        return said


@contextmanager
def running(*args: str, cwd: Path, **env: str) -> Iterator[Running]:
    """Run a command that listens on a free port, until the block is left."""
    port = free_port()
    log = cwd / f"{args[0]}-{port}.log"
    command = ["-m", "receiver", *args, "--port", str(port)]
    process = Forked(command, cwd, environment(env), log, log)
    server = Running(process, log, port)
    try:
        yield server
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) in {0, -signal.SIGTERM}, server.said()
    finally:
        process.kill()
        process.wait()
