"""Run a program on every event. Use: `COMMAND="python3 my_script.py" receiver serve command`.

COMMAND is split as by a shell, but no shell runs it. The event is JSON on its standard input. Its
environment has RECEIVER_EVENT_ID, RECEIVER_DELIVERY_KEY (the same for all retries) and
RECEIVER_ATTEMPT, and otherwise only PATH, HOME, LANG, LC_ALL, TMPDIR, TZ and the variables that
COMMAND_ENV names, so none of the receiver's secrets.

Exit status 0 means done, 65 (EX_DATAERR) gives up; 75 (EX_TEMPFAIL), any other status and a signal
are retried. The last 4,000 characters of its output are kept with the attempt.
It runs in its own process group, which is ended by SIGTERM, and 2 seconds later by SIGKILL, if it
takes too long, if the attempt is stopped, or if it leaves processes that hold its output open.
"""

import asyncio
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Awaitable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from receiver import Context, Dead, Event, Retry, on, read_settings

NAMES = ["PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TZ"]
GRACE = 2.0  # seconds from SIGTERM to SIGKILL
LINGER = 0.5  # seconds to wait for more output after the program has ended
LONGEST_OUTPUT = 4_000
MOST_BYTES = 4 * LONGEST_OUTPUT
LONGEST_LINE = 300
ENDINGS: dict[int, type[Dead | Retry] | None] = {
    0: None,
    os.EX_DATAERR: Dead,
    os.EX_TEMPFAIL: Retry,  # as for any other status
}


def folder(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if not path.is_dir():
        raise ValueError(f"is not a folder: {path}")
    return path


def arguments(text: str) -> list[str]:
    """Split a command and find its program."""
    try:
        name, *others = shlex.split(text)
    except ValueError:
        raise ValueError("must be a program and its arguments, with every quote closed") from None
    # `str`, since FOLDER is None if COMMAND_DIR is wrong itself.
    program = shutil.which(Path(str(FOLDER), name) if "/" in name else name)
    if program is None:
        raise ValueError(f"cannot be run: {name!r} is not a program")
    return [program, *others]


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


with read_settings() as read:
    FOLDER = read.parsed(
        "COMMAND_DIR", "a folder to run it in, where a COMMAND like ./run is", folder, default="."
    )
    ARGUMENTS = read.parsed("COMMAND", "a program and its arguments", arguments)
    TIMEOUT = read.seconds("COMMAND_TIMEOUT", "how long it may take", default="60")
    MORE = read.parsed(
        "COMMAND_ENV", "names of other variables that it gets, by comma", names, default=""
    )
    RAW = read.switch("COMMAND_RAW", "whether the event has the provider's own payload, `raw`")


@on("*", name="command", timeout=TIMEOUT + GRACE + 5)
async def command(event: Event, ctx: Context) -> None:
    await ctx.once("command", partial(run, event, ctx))


async def run(event: Event, ctx: Context) -> None:
    tail = Tail()
    ends = zip(os.pipe(), ("rb", "wb"), strict=True)
    read, write = (os.fdopen(end, mode, 0) for end, mode in ends)
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: tail, read)
    try:
        with write:
            program = Program(event, ctx, write)
        try:
            status = await program.wait()
        finally:
            ctx.note(tail.text())  # now, as a stopped attempt may not get to the last lines
            await program.clear(tail)
        check_status(status, tail.text())
    finally:
        pipe.close()
        ctx.note(tail.text())


class Tail(asyncio.Protocol):
    """Keeps the end of an output, but reads all of it, so that the program can always write."""

    def __init__(self) -> None:
        self.kept = b""
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.kept = (self.kept + data)[-MOST_BYTES:]

    def connection_lost(self, _: Exception | None) -> None:
        self.ended.set()

    def text(self) -> str:
        return self.kept.decode(errors="replace")[-LONGEST_OUTPUT:]


class Program:
    """A process and its group.

    Popen closes our open files in the process, which uvloop's subprocesses do not.
    """

    def __init__(self, event: Event, ctx: Context, output: Any) -> None:
        with tempfile.TemporaryFile() as given:  # unlike a pipe, it needs no reader
            given.write(written(event))
            given.seek(0)
            self.process = subprocess.Popen(  # noqa: S603 - the operator's own command
                ARGUMENTS,
                stdin=given,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=FOLDER,
                env=environment(event, ctx),
                start_new_session=True,
            )
        self.ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._reap, args=(loop,), daemon=True).start()

    def _reap(self, loop: asyncio.AbstractEventLoop) -> None:
        self.process.wait()
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self.ended.set)

    async def wait(self) -> int | None:
        """Return the exit status, or None if it takes too long."""
        return self.process.returncode if await within(TIMEOUT, self.ended.wait()) else None

    async def clear(self, tail: Tail) -> None:
        """End the remaining processes of the group: by SIGTERM, then by SIGKILL."""
        cleared = False
        try:
            cleared = self.ended.is_set() and await within(LINGER, tail.ended.wait())
            if not cleared:
                self._signal(signal.SIGTERM)
                await within(GRACE, asyncio.gather(self.ended.wait(), tail.ended.wait()))
        finally:  # also if this wait is cancelled: nothing else would kill them
            if not cleared:
                self._signal(signal.SIGKILL)

    def _signal(self, what: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):  # the latter on macOS
            os.killpg(self.process.pid, what)


def written(event: Event) -> bytes:
    fields = [name for name in event.__struct_fields__ if RAW or name != "raw"]
    return msgspec.json.encode({name: event[name] for name in fields})


def environment(event: Event, ctx: Context) -> dict[str, str]:
    return {
        **{name: os.environ[name] for name in NAMES + MORE if name in os.environ},
        "RECEIVER_EVENT_ID": event.id,
        "RECEIVER_DELIVERY_KEY": ctx.idempotency_key,
        "RECEIVER_ATTEMPT": str(ctx.attempt),
    }


async def within(seconds: float, work: Awaitable[Any]) -> bool:
    try:
        await asyncio.wait_for(work, seconds)
    except TimeoutError:
        return False
    return True


def check_status(status: int | None, output: str) -> None:
    ending = ENDINGS.get(status, Retry) if status is not None else Retry
    if ending is not None:
        last = "".join(output.strip().splitlines()[-1:])[:LONGEST_LINE]
        raise ending(f"{describe_exit(status)}: {last}" if last else describe_exit(status))


def describe_exit(status: int | None) -> str:
    if status is None:
        return f"longer than {TIMEOUT:g} s"
    return f"exit {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"
