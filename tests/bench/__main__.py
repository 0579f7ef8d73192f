"""Measure accepting, draining, waiting, memory and starting, against an empty route.

`python -m tests.bench [requests]`: one run on one machine; the ratios are to the empty route of the
same run. Requests are closed-loop from another process over 64 connections, each answered before
the next; every callback is distinct, proved, and committed with synchronous=FULL before its 200.
"""

from __future__ import annotations

import asyncio
import platform
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

import uvloop

from receiver.model import delivery_id
from tests.bench import scene
from tests.bench.load import Report, drip, hammer, post

COUNT = 20_000
RATE = 1_000
SECONDS = 6


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else COUNT
    print(
        f"{platform.machine()}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )
    with scene.jwks() as jwks_url:
        empty = _empty(count)
        for provider in ("eachlabs", "fal"):
            _accept(provider, count, jwks_url, empty)
        _drain(count, jwks_url)
        _latency(jwks_url)
        _cold_start(jwks_url)


def _empty(count: int) -> float:
    with _home() as home, scene.running(scene.empty_route(home)) as server:
        request = post("/webhooks/eachlabs/token", b'{"status": "succeeded"}' * 6, {})
        _load(hammer, server.port, [request] * (count // 4))
        report = _load(hammer, server.port, [request] * count)
    _print("empty Starlette route", report)
    return report.rate


def _accept(provider: str, count: int, jwks_url: str, empty: float) -> None:
    with _home() as home:
        ids = scene.seed(home / "receiver.db", provider, count + 500)
        requests = [scene.callback(provider, *pair) for pair in ids]
        with scene.running(scene.receiver(home, jwks_url)) as server:
            _load(hammer, server.port, requests[:500])
            report = _load(hammer, server.port, requests[500:])
            repeats = _load(hammer, server.port, requests[500:])
            resident = server.resident()
        accepted = scene.ask(home, "SELECT count(*) FROM events")[0][0]
    _print(f"durable accept, {provider}", report, empty)
    _print(f"duplicates, {provider}", repeats, empty)
    print(f"    {accepted} events for {len(ids)} predictions; resident {resident / 1e6:.0f} MB")


def _drain(count: int, jwks_url: str) -> None:
    """Owe `count` deliveries, then start with a handler that does nothing."""
    with _home() as home:
        ids = scene.seed(home / "receiver.db", "eachlabs", count)
        requests = [scene.callback("eachlabs", *pair) for pair in ids]
        with scene.running(scene.receiver(home, jwks_url)) as server:
            _load(hammer, server.port, requests)
        with sqlite3.connect(home / "receiver.db") as connection:
            connection.executemany(
                "INSERT INTO deliveries (id, prediction_id, handler, state, due_at, created_at) "
                "VALUES (?, ?, 'empty', 'pending', 1, 1)",
                [(delivery_id(ours, "empty"), ours) for ours, _ in ids],
            )
        connection.close()
        with scene.running(scene.receiver(home, jwks_url, "empty_handler.py")) as server:
            owed = "SELECT count(*) FROM deliveries WHERE state <> 'done'"
            ends = time.monotonic() + 120
            while scene.ask(home, owed)[0][0] and time.monotonic() < ends:
                time.sleep(0.25)
            resident = server.resident()
        first, last, done = scene.ask(
            home, "SELECT min(started_at), max(ended_at), count(*) FROM attempts"
        )[0]
    print(f"{'deliveries drained':34}{done / (last - first):>9,.0f}/s   {resident / 1e6:.0f} MB")


def _latency(jwks_url: str) -> None:
    with _home() as home:
        ids = scene.seed(home / "receiver.db", "eachlabs", RATE * SECONDS)
        requests = [scene.callback("eachlabs", *pair) for pair in ids]
        with scene.running(scene.receiver(home, jwks_url, "empty_handler.py")) as server:
            answers = asyncio.run(drip(server.port, requests, RATE))
            time.sleep(1)
        waits = scene.ask(
            home,
            "SELECT a.started_at - e.time FROM attempts a JOIN deliveries d ON d.id = a.delivery_id"
            " JOIN events e ON e.id = d.event_id",
        )
    ordered = sorted(wait for (wait,) in waits)
    print(
        f"{f'callback to handler start, {RATE}/s':34}"
        f"p50 {1e3 * ordered[len(ordered) // 2]:.1f} ms   "
        f"p99 {1e3 * ordered[int(len(ordered) * 0.99)]:.1f} ms   "
        f"(answers: p50 {1e3 * answers.percentile(0.5):.1f} ms, "
        f"p99 {1e3 * answers.percentile(0.99):.1f} ms, {answers.rate:,.0f}/s)"
    )


def _cold_start(jwks_url: str) -> None:
    """Time a fresh process up to its first accepted callback, several times."""
    times = []
    for _ in range(5):
        with _home() as home:
            ((ours, theirs),) = scene.seed(home / "receiver.db", "eachlabs", 1)
            request = scene.callback("eachlabs", ours, theirs)
            began = time.perf_counter()
            with scene.running(scene.receiver(home, jwks_url)) as server:
                report = asyncio.run(hammer(server.port, [request], 1))
                times.append(time.perf_counter() - began)
                assert report.statuses == {200: 1}
    middle, best = sorted(times)[len(times) // 2], min(times)
    print(f"{'cold start to accepted callback':34}{middle:>9.2f} s   (best {best:.2f})")


def _load(
    run: Callable[..., Coroutine[None, None, Report]], port: int, requests: Sequence[bytes]
) -> Report:
    """Run the load in this process, on uvloop, and insist that everything was answered 200."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(run(port, requests))
    assert report.statuses == {200: len(requests)}, report.statuses
    return report


def _print(name: str, report: Report, empty: float | None = None) -> None:
    ratio = f"{100 * report.rate / empty:.0f} % of empty" if empty else ""
    print(
        f"{name:34}{report.rate:>9,.0f}/s   p50 {1e3 * report.percentile(0.5):.1f} ms   "
        f"p99 {1e3 * report.percentile(0.99):.1f} ms   {ratio}"
    )


class _home(tempfile.TemporaryDirectory[str]):  # noqa: N801 - reads as a function
    def __enter__(self) -> Path:  # type: ignore[override]
        return Path(super().__enter__())


if __name__ == "__main__":
    main()
