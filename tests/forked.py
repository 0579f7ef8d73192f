"""Processes of the program, forked from one that has imported it: an import costs 0.4 s of CPU.

It has also made the commands, which takes another 0.1 s. Apart from that, each is a separate
process, which can be killed. Tests of the start itself start Python instead.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Final

from tests.patience import PATIENCE

_CONTEXT: Final = multiprocessing.get_context("forkserver")
_IMPORTED: Final = [
    "receiver.app",
    "receiver.cli.commands",
    "receiver.cli.emulating",
    "receiver.emulator",
    "receiver.http.server",
    "receiver.store.postgres.engine",
    "receiver.store.postgres.queue",
    "tests.commands",
    "typer._adapters",  # imports pydantic, if it is installed
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
]
_CONTEXT.set_forkserver_preload(_IMPORTED)


class Forked:
    """A process of `python ARGUMENTS`, with the part of subprocess.Popen that tests use."""

    def __init__(
        self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], out: Path, err: Path
    ) -> None:
        self._process = _CONTEXT.Process(
            target=_run, args=([str(one) for one in arguments], cwd, dict(env), out, err)
        )
        self._looking = threading.Lock()
        for path in (out, err):
            path.touch()  # so that they can be read at once
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        with self._looking:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        connection.wait([self._process.sentinel], timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_to_end(
    arguments: Sequence[str], cwd: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` to its end, and return its exit code and output."""
    with tempfile.TemporaryDirectory() as aside:
        out, err = Path(aside, "out"), Path(aside, "err")
        process = Forked(arguments, cwd, env, out, err)
        try:
            code = process.wait(PATIENCE)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())


def _run(arguments: list[str], cwd: Path, env: dict[str, str], out: Path, err: Path) -> None:
    gc.freeze()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    sys.path[:0] = [str(cwd), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    first, *sys.argv = arguments
    try:
        if first == "-m":
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            code, sys.argv[0] = sys.argv[0], "-c"
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv.insert(0, first)
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # noqa: SLF001 - Python does it, multiprocessing does not
