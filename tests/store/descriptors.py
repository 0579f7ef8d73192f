"""Close the files of an open database, write on, exit, and print which writes succeeded and failed.

Usage: descriptors.py DATABASE {nothing,another file,the database} SUFFIX… (of the files to close).
"""

import asyncio
import json
import os
import sys
import threading

from receiver.model.errors import StoreUnavailable
from receiver.store.facade import sql
from receiver.store.leases import LeaseRequest
from receiver.store.sqlite.engine import SQLiteStore
from tests.patience import PATIENCE

_OPEN = "/proc/self/fd"


def open_now(path: str) -> list[int]:
    found = []
    for name in os.listdir(_OPEN):  # noqa: PTH208 - numbers
        try:
            file = os.readlink(f"{_OPEN}/{name}")  # noqa: PTH115
        except OSError:
            continue  # the descriptor of the listing itself
        if file == path:
            found.append(int(name))
    return found


async def main(path: str, reuse: str, suffixes: list[str]) -> None:
    store = SQLiteStore(path, lambda _: None)
    checkpointer = store._checkpointer  # noqa: SLF001 - nothing else shows when it has its files
    checkpoint = checkpointer._checkpoint  # noqa: SLF001
    checkpointing = threading.Lock()
    has_files = threading.Event()

    def one_checkpoint() -> None:
        with checkpointing:
            checkpoint()
            has_files.set()

    checkpointer._checkpoint = one_checkpoint  # type: ignore[method-assign] # noqa: SLF001
    store.open()
    promised: list[str] = []
    refused: list[str] = []

    async def hold(name: str) -> None:
        try:
            await store.leases.hold(LeaseRequest(name=name, owner="me", now=1.0, until=2.0))
        except StoreUnavailable as error:
            refused.append(str(error))
        else:
            promised.append(name)

    for number in range(5):
        await hold(f"before {number}")
    await asyncio.gather(*(store.read(sql.last_change) for _ in range(4)))
    assert await asyncio.to_thread(has_files.wait, PATIENCE)
    with checkpointing:  # a checkpoint under way could write to the new files
        closed = [fd for suffix in suffixes for fd in open_now(path + suffix)]
        for fd in closed:
            os.close(fd)
        if reuse != "nothing":
            name = path if reuse == "the database" else f"{path}.other"
            for _ in closed:
                os.open(name, os.O_RDWR | os.O_CREAT)
    for number in range(20):
        await hold(f"after {number}")
        await asyncio.sleep(0.02)  # so that checkpoints run in between
    sys.stdout.write(json.dumps([promised, refused]))
    sys.stdout.flush()
    os._exit(9)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
