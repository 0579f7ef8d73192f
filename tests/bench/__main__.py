"""Measure accepting, submitting, draining, waiting, memory and starting, against an empty route.

`python -m tests.bench [requests]`: one run on one machine, both engines side by side; the ratios
are to the empty route of the same run. Requests are closed-loop from another process over 64
connections, each answered before the next; every callback is distinct, proved, and committed and
synced before its 200. PostgreSQL runs on the same machine, with its own settings as they come.
"""

from __future__ import annotations

import asyncio
import os
import platform
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from pathlib import Path

import uvloop

from tests.bench import scene
from tests.bench.load import Report, drip, hammer, post
from tests.postgres import Database, start_server

COUNT = 20_000
RATE = 1_000
SECONDS = 6
SIZES = (1_000, 1_000_000)
IN_FLIGHT = (0, 30_000)


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    with scene.jwks() as jwks_url, tempfile.TemporaryDirectory() as folder:
        given = os.environ.get("TEST_DATABASE_URL")
        server = Database(given) if given else start_server(Path(folder) / "pg", durable=True)
        version = server.rows("SHOW server_version")[0][0]
        print(
            f"{platform.machine()}, Python {platform.python_version()}, "
            f"SQLite {sqlite3.sqlite_version}, PostgreSQL {version}"
        )
        empty = _empty(count)
        for place in (None, server):
            for provider in ("eachlabs", "fal"):
                _accept(place, provider, count, jwks_url, empty)
            _latency(place, jwks_url)
            _cold_start(place, jwks_url)
            _submit(place, count // 10, jwks_url, empty)
        _drain(None, count, jwks_url, workers=0)
        for workers in (1, 2):
            _drain(server, count, jwks_url, workers=workers)
        for place in (None, server):
            _growth(place, count // 2, jwks_url)


def _empty(count: int) -> Report:
    with scene.books(None) as (home, _), scene.running(scene.empty_route(home)) as server:
        request = post("/webhooks/eachlabs/token", b'{"status": "succeeded"}' * 6, {})
        _load(hammer, server, [request] * (count // 4))
        report = _load(hammer, server, [request] * count)
    _print("empty Starlette route", report)
    return report


def _accept(
    place: Database | None, provider: str, count: int, jwks_url: str, empty: Report
) -> None:
    with scene.books(place) as (home, books):
        ids = books.seed(provider, count + 500)
        requests = [scene.callback(provider, *pair) for pair in ids]
        with scene.running(scene.receiver(home, books, jwks_url)) as server:
            _load(hammer, server, requests[:500])
            report = _load(hammer, server, requests[500:])
            repeats = _load(hammer, server, requests[500:])
            resident = server.resident()
            connections = _connections(books)
        accepted = books.ask("SELECT count(*) FROM events")[0][0]
    _print(f"{books.engine}: durable accept, {provider}", report, empty)
    _print(f"{books.engine}: duplicates, {provider}", repeats, empty)
    print(
        f"    {accepted} events for {len(ids)} predictions; resident {resident / 1e6:.0f} MB"
        f"{connections}"
    )


def _connections(books: scene.Books) -> str:
    if books.engine != "PostgreSQL":
        return ""
    sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'receiver'"
    return f", {books.ask(sql)[0][0]} connections"


def _drain(place: Database | None, count: int, jwks_url: str, *, workers: int) -> None:
    """Owe `count` deliveries to a handler that does nothing; then run them."""
    with scene.books(place) as (home, books), ExitStack() as stack:
        ids = books.seed("eachlabs", count)
        requests = [scene.callback("eachlabs", *pair) for pair in ids]
        accepting = scene.receiver(home, books, jwks_url, "empty_handler.py", "--no-dispatch")
        with scene.running(accepting) as server:
            _load(hammer, server, requests)
        running = [scene.worker(home, books, jwks_url) for _ in range(workers)] or [
            scene.receiver(home, books, jwks_url, "empty_handler.py")
        ]
        for process in running:
            stack.enter_context(scene.running(process))
        ends = time.monotonic() + 120
        while books.ask("SELECT count(*) FROM attempts")[0][0] < count and time.monotonic() < ends:
            time.sleep(0.25)
        resident = max(process.resident() for process in running)
        first, last, done = books.ask(
            "SELECT min(started_at), max(ended_at), count(*) FROM attempts"
        )[0]
    name = f"{books.engine}: deliveries, {max(workers, 1)} process(es)"
    print(f"{name:44}{done / (last - first):>9,.0f}/s   {resident / 1e6:.0f} MB")


def _latency(place: Database | None, jwks_url: str) -> None:
    with scene.books(place) as (home, books):
        ids = books.seed("eachlabs", RATE * SECONDS)
        requests = [scene.callback("eachlabs", *pair) for pair in ids]
        with scene.running(scene.receiver(home, books, jwks_url, "empty_handler.py")) as server:
            answers = asyncio.run(drip(server.port, requests, RATE))
            time.sleep(1)
        waits = books.ask(
            "SELECT a.started_at - e.time FROM attempts a JOIN deliveries d ON d.id = a.delivery_id"
            " JOIN events e ON e.id = d.event_id",
        )
    ordered = sorted(wait for (wait,) in waits)
    print(
        f"{f'{books.engine}: callback to handler, {RATE}/s':44}"
        f"p50 {1e3 * ordered[len(ordered) // 2]:.1f} ms   "
        f"p99 {1e3 * ordered[int(len(ordered) * 0.99)]:.1f} ms   "
        f"(answers: p50 {1e3 * answers.percentile(0.5):.1f} ms, "
        f"p99 {1e3 * answers.percentile(0.99):.1f} ms, {answers.rate:,.0f}/s)"
    )


def _cold_start(place: Database | None, jwks_url: str) -> None:
    """Time a fresh process up to its first accepted callback, several times."""
    times = []
    engine = "SQLite" if place is None else "PostgreSQL"
    for _ in range(5):
        with scene.books(place) as (home, books):
            ((ours, theirs),) = books.seed("eachlabs", 1)
            request = scene.callback("eachlabs", ours, theirs)
            began = time.perf_counter()
            with scene.running(scene.receiver(home, books, jwks_url)) as server:
                report = asyncio.run(hammer(server.port, [request], 1))
                times.append(time.perf_counter() - began)
                assert report.statuses == {200: 1}
    middle, best = sorted(times)[len(times) // 2], min(times)
    name = f"{engine}: cold start to accepted callback"
    print(f"{name:44}{middle:>9.2f} s   (best {best:.2f})")


def _growth(place: Database | None, count: int, jwks_url: str) -> None:
    """Accept and deliver with few and with a million predictions stored."""
    rates = []
    for size in SIZES:
        with scene.books(place) as (home, books):
            ids = books.seed("eachlabs", count)
            books.fill(size)
            requests = [scene.callback("eachlabs", *pair) for pair in ids]
            with scene.running(scene.receiver(home, books, jwks_url, "empty_handler.py")) as server:
                _load(hammer, server, requests[: count // 4])
                report = _load(hammer, server, requests[count // 4 :])
            rates.append(report.rate)
            _print(f"{books.engine}: accept and deliver, {size:,} stored", report)
    print(f"    {100 * rates[1] / rates[0]:.0f} % with {SIZES[1]:,} stored")


def _submit(place: Database | None, count: int, jwks_url: str, empty: Report) -> None:
    """Submit to a provider that answers at once, with few and with many predictions in flight."""
    for in_flight in IN_FLIGHT:
        with scene.books(place) as (home, books), ExitStack() as stack:
            # Of a provider without a key, as a start polls all that its providers have in flight.
            books.seed("eachlabs", in_flight)
            provider = stack.enter_context(scene.running(scene.instant_provider(home)))
            serving = scene.receiver(
                home, books, jwks_url, submits_to=f"http://127.0.0.1:{provider.port}"
            )
            server = stack.enter_context(scene.running(serving))
            _load(hammer, server, [scene.submit(n) for n in range(count // 10)], 202)
            report = _load(hammer, server, [scene.submit(n) for n in range(count)], 202)
        _print(f"{books.engine}: submit, {in_flight:,} in flight", report, empty)


def _load(
    run: Callable[..., Coroutine[None, None, Report]],
    server: scene.Server,
    requests: Sequence[bytes],
    status: int = 200,
) -> Report:
    """Run the load in this process, on uvloop, and insist that every answer has that status."""
    before = server.cpu()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(run(server.port, requests))
    report.cpu = (server.cpu() - before) / len(requests)
    assert report.statuses == {status: len(requests)}, report.statuses
    return report


def _print(name: str, report: Report, empty: Report | None = None) -> None:
    ratio = cost = ""
    if empty:
        ratio = f"{100 * report.rate / empty.rate:.0f} % of empty"
        cost = f", {report.cpu / empty.cpu:.1f} empty"
    print(
        f"{name:44}{report.rate:>9,.0f}/s   p50 {1e3 * report.percentile(0.5):.1f} ms   "
        f"p99 {1e3 * report.percentile(0.99):.1f} ms   "
        f"CPU {1e6 * report.cpu:.0f} us{cost}   {ratio}"
    )


if __name__ == "__main__":
    main()
