"""Commands in bash, with each `receiver` forked: a new process costs half a second of CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.forked import Forked
from tests.patience import PATIENCE

_RECEIVER: Final = """
receiver() {
  { printf '%s\\0' "$PWD" "$#" "$@"; env -0; } > "$ASIDE/asks"
  local code
  read -r code < "$ASIDE/answers"
  cat "$ASIDE/out"
  cat "$ASIDE/err" >&2
  return "$code"
}
"""


@contextmanager
def bash(
    commands: str, cwd: Path, env: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run commands until the block is left, which ends those that still run."""
    with tempfile.TemporaryDirectory() as name, log.open("wb") as output:
        aside = Path(name)
        for pipe in ("asks", "answers"):
            os.mkfifo(aside / pipe)
        running: list[Forked] = []
        forking = threading.Thread(target=_fork, args=(aside, running))
        forking.start()
        process = subprocess.Popen(
            ["bash", "-e", "-c", _RECEIVER + commands],
            cwd=cwd,
            env={**env, "ASIDE": name},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(PATIENCE)
            for one in running:
                one.send_signal(signal.SIGTERM)
            with (aside / "asks").open("wb"):
                pass  # an empty request ends the thread
            forking.join()


def _fork(aside: Path, running: list[Forked]) -> None:
    """Run the requested commands one after another, until an empty request."""
    answers = os.open(aside / "answers", os.O_RDWR)  # O_RDWR does not wait for a reader
    while asked := (aside / "asks").read_bytes():
        cwd, count, *rest = asked.decode().split("\0")[:-1]
        arguments, variables = rest[: int(count)], rest[int(count) :]
        env = dict(one.split("=", 1) for one in variables)
        out, err = aside / "out", aside / "err"
        for path in (out, err):
            path.unlink(missing_ok=True)
        running.append(process := Forked(["-m", "receiver", *arguments], Path(cwd), env, out, err))
        code = process.wait()
        running.remove(process)
        os.write(answers, f"{code}\n".encode())
    os.close(answers)
