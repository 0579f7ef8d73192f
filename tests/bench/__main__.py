"""Measure the receiver's speed and costs against an empty route, and print one table.

`python -m tests.bench [NAME …]`: all, or those measurements (accept, submit, deliver, latency,
start, polling, blocking, save, growth). Both engines run side by side on one machine. The columns
are: the rate per second; the median and the 99th percentile of a caller's wait; the CPU of the
process per request, in microseconds and as a multiple of the empty route's in the same minute; the
ratio of the rate to that of the empty route; and resident memory. Each row has the median of
several short runs.
"""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.bench import scene
from tests.bench.measures import MEASURES, Bench
from tests.postgres import Database, start_server


def main() -> None:
    chosen = sys.argv[1:] or list(MEASURES)
    if unknown := set(chosen) - MEASURES.keys():
        sys.exit(f"no such measurement: {', '.join(unknown)}; there are {', '.join(MEASURES)}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        given = os.environ.get("TEST_DATABASE_URL")
        server = Database(given) if given else start_server(folder / "pg", durable=True)
        [(version,)] = server.rows("SHOW server_version")
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
            f"SQLite {sqlite3.sqlite_version}, PostgreSQL {version}"
        )
        empty = stack.enter_context(scene.running(scene.empty_route(folder)))
        bench = Bench(stack.enter_context(scene.jwks()), empty)
        for name in chosen:
            for place in (None, server):
                MEASURES[name](bench, place)


if __name__ == "__main__":
    main()
