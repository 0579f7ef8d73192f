"""The measurements, each a function of an engine that prints rows of the table."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from itertools import pairwise
from statistics import median
from typing import Any, Final

import msgspec
import uvloop

from receiver.model.values import Outcome, Output, Recipients, Status
from receiver.store.inbox import CurrentState, IncomingOutcome, Transition, accept_outcome
from tests.bench import scene
from tests.bench.load import Report, drip, hammer, post
from tests.postgres import Database

ROUNDS: Final = 5
ACCEPTS: Final = 3000
"""Callbacks of each round."""
SUBMITS: Final = 400
DELIVERIES: Final = 20_000
LATENCY: Final = (1_000, 2, 6)
"""Callbacks per second, the seconds of the start, which are not measured, and those after them."""
POLLING: Final = (200, 8)
IN_FLIGHT: Final = 100_000
STORED: Final = 1_000_000
STARTS: Final = 7
FILES: Final = 200
IDLE: Final = 1e-4
"""Seconds up to which a turn of the event loop counts as idle."""
LIMITS: Final = {"FAL_MAX_IN_FLIGHT": "200000", "FAL_REQUESTS_PER_MINUTE": "1000000"}
_EMPTY: Final = post("/webhooks/eachlabs/token", b'{"status": "succeeded"}' * 6, {})

_HEAD: Final = ("", "a second", "p50 ms", "p99 ms", "CPU us", "in empty", "of empty", "MB")
_LINE: Final = "{:46}{:>10}{:>9}{:>9}{:>9}{:>10}{:>10}{:>6}"


class Bench:
    """Prints the table, and compares measurements with the empty route, which runs all the time."""

    def __init__(self, jwks_url: str, empty: scene.Server) -> None:
        self.jwks_url = jwks_url
        self._empty = empty
        self._load_empty()
        print(_LINE.format(*_HEAD))
        reports = [self._load_empty() for _ in range(ROUNDS)]
        self.row("empty Starlette route", reports, reports, empty)

    def against_empty(
        self, name: str, server: scene.Server, requests: Sequence[bytes], status: int = 200
    ) -> float:
        """Send requests in rounds, each after one of the empty route; return the median rate."""
        reports, beside = [], []
        each = -(-len(requests) // ROUNDS)
        for first in range(0, len(requests), each):
            beside.append(self._load_empty())
            reports.append(load(server, requests[first : first + each], status))
        self.row(name, reports, beside, server)
        return median(report.rate for report in reports)

    def _load_empty(self) -> Report:
        return load(self._empty, [_EMPTY] * ACCEPTS)

    def beside_empty(self, name: str, rate: str, cpu: float, memory: str) -> None:
        """Print a row of work other than requests: its CPU, compared with the empty route's."""
        empty = self._load_empty().cpu
        tell(name, rate, "", "", f"{1e6 * cpu:.0f}", f"{cpu / empty:.1f}", "", memory)

    def row(
        self, name: str, reports: list[Report], beside: list[Report], server: scene.Server
    ) -> None:
        pairs = list(zip(reports, beside, strict=True))
        tell(
            name,
            f"{median(one.rate for one in reports):,.0f}",
            *(f"{1e3 * median(r.percentile(p) for r in reports):.1f}" for p in (0.5, 0.99)),
            f"{1e6 * median(one.cpu for one in reports):.0f}",
            f"{median(one.cpu / empty.cpu for one, empty in pairs):.1f}",
            f"{median(one.rate / empty.rate for one, empty in pairs):.3f}",
            megabytes(server),
        )


def tell(name: str, *cells: str) -> None:
    print(_LINE.format(name, *cells, *[""] * (len(_HEAD) - 1 - len(cells))), flush=True)


def megabytes(server: scene.Server) -> str:
    return f"{server.resident() / 1e6:.0f}"


def waits(seconds: Sequence[float]) -> tuple[str, str]:
    """Return the columns of a median and a 99th percentile."""
    ordered = sorted(seconds)
    return (
        f"{1e3 * ordered[len(ordered) // 2]:.1f}",
        f"{1e3 * ordered[len(ordered) * 99 // 100]:.1f}",
    )


def load(server: scene.Server, requests: Sequence[bytes], status: int = 200) -> Report:
    """Send all requests as fast as answers come, and check that every answer has `status`."""
    before = server.cpu()
    report = run(hammer(server.port, requests))
    report.cpu = (server.cpu() - before) / len(requests)
    assert report.statuses == {status: len(requests)}, report.statuses
    return report


def run(work: Coroutine[Any, Any, Report]) -> Report:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


def accept(bench: Bench, place: Database | None) -> None:
    """Send distinct callbacks, which are stored; then some of them again, as duplicates."""
    for provider in ("eachlabs", "fal"):
        with scene.books(place) as (home, books):
            ids = books.seed(provider, ROUNDS * ACCEPTS + 500)
            requests = [scene.callback(provider, *pair) for pair in ids]
            with scene.running(scene.receiver(home, books, bench.jwks_url)) as server:
                load(server, requests[:500])
                bench.against_empty(f"{books.engine}: accept, {provider}", server, requests[500:])
                again = requests[500 : 500 + ACCEPTS]
                bench.against_empty(f"{books.engine}: duplicates, {provider}", server, again)
            assert books.ask("SELECT count(*) FROM events") == [(len(ids),)]


def submit(bench: Bench, place: Database | None) -> None:
    """Submit to a provider that answers at once, with no and with many predictions in flight."""
    for limits in ({}, LIMITS):
        for in_flight in (0, IN_FLIGHT):
            with scene.books(place) as (home, books), ExitStack() as stack:
                server = stack.enter_context(scene.submitting(home, books, bench.jwks_url, limits))
                load(server, [scene.submit(n) for n in range(SUBMITS // 4)], 202)
                # Inserted now, as a start would poll them all.
                books.fill_in_flight(in_flight)
                name = f"{books.engine}: submit, {in_flight:,} in flight"
                requests = [scene.submit(n) for n in range(ROUNDS * SUBMITS)]
                bench.against_empty(name + ", limits" * bool(limits), server, requests, 202)


def deliver(bench: Bench, place: Database | None) -> None:
    """Store pending deliveries of a handler that does nothing; then run them."""
    for workers in (1,) if place is None else (1, 2):
        with scene.books(place) as (home, books), ExitStack() as stack:
            requests = [
                scene.callback("eachlabs", *pair) for pair in books.seed("eachlabs", DELIVERIES)
            ]
            accepting = scene.receiver(
                home, books, bench.jwks_url, "empty_handler.py", "--no-dispatch"
            )
            with scene.running(accepting) as server:
                load(server, requests)
            running = [
                scene.receiver(home, books, bench.jwks_url, "empty_handler.py")
                if place is None
                else scene.worker(home, books, bench.jwks_url)
                for _ in range(workers)
            ]
            for process in running:
                stack.enter_context(scene.running(process))
            until(lambda: _attempts(books) > 0)
            begun, before = _attempts(books), sum(process.cpu() for process in running)
            until(lambda: _attempts(books) == DELIVERIES)
            used = sum(process.cpu() for process in running) - before
            cpu = used / (DELIVERIES - begun)
            memory = megabytes(running[0])
            [(seconds,)] = books.ask("SELECT max(ended_at) - min(started_at) FROM attempts")
        name = f"{books.engine}: deliveries, {workers} worker{'s' * (workers > 1)}"
        bench.beside_empty(name, f"{DELIVERIES / seconds:,.0f}", cpu, memory)
    for records in () if place is None else (False, True):
        with scene.books(place) as (home, books):
            seconds, used, peak = scene.pgqueuer_alone(home, books.url, DELIVERIES, records=records)
        name = "PgQueuer's own worker: empty jobs" + ", each with a row" * records
        rate, size = f"{DELIVERIES / seconds:,.0f}", f"{peak / 1e6:.0f}"
        bench.beside_empty(name, rate, used / DELIVERIES, size)


def _attempts(books: scene.Books) -> int:
    [(number,)] = books.ask("SELECT count(*) FROM attempts")
    return int(number)


def latency(bench: Bench, place: Database | None) -> None:
    """Send callbacks at a steady rate; measure the time to the answer, and to the handler."""
    rate, start, seconds = LATENCY
    with scene.books(place) as (home, books):
        ids = books.seed("eachlabs", rate * (start + seconds))
        requests = [scene.callback("eachlabs", *pair) for pair in ids]
        serving = scene.receiver(home, books, bench.jwks_url, "empty_handler.py")
        with scene.running(serving) as server:
            run(drip(server.port, requests[: rate * start], rate))
            answers = run(drip(server.port, requests[rate * start :], rate))
            until(lambda: _attempts(books) == len(ids))
            memory = megabytes(server)
        found = books.ask(
            "SELECT a.started_at - e.time FROM attempts a JOIN deliveries d ON d.id = a.delivery_id"
            " JOIN events e ON e.prediction_id = d.prediction_id ORDER BY e.time"
        )[rate * start :]
    sent = f"{answers.rate:,.0f}"
    tell(f"{books.engine}: answers at {rate}/s", sent, *waits(answers.latencies))
    handled = waits([wait for (wait,) in found])
    tell(f"{books.engine}: callback to handler", sent, *handled, "", "", "", memory)


def start(bench: Bench, place: Database | None) -> None:
    """Time new processes up to their first answer: of an empty route, and to a callback."""
    if place is None:
        with scene.books(None) as (home, _):
            route = "empty route: start to answer"
            _starts(route, lambda: scene.empty_route(home), [_EMPTY] * STARTS)
    with scene.books(place) as (home, books):
        requests = [scene.callback("eachlabs", *pair) for pair in books.seed("eachlabs", STARTS)]
        name = f"{books.engine}: start to accepted callback"
        _starts(name, lambda: scene.receiver(home, books, bench.jwks_url), requests)


def _starts(name: str, make: Callable[[], scene.Server], requests: Sequence[bytes]) -> None:
    seconds, cpu = [], []
    for request in requests:
        began = time.perf_counter()
        with scene.running(make()) as server:
            report = run(hammer(server.port, [request], 1))
            seconds.append(time.perf_counter() - began)
            cpu.append(server.cpu())
            assert report.statuses == {200: 1}
    tell(name, "", *waits(seconds), f"{1e6 * median(cpu):.0f}")


def polling(bench: Bench, place: Database | None) -> None:
    """Accept callbacks after a start, while many predictions in flight are polled."""
    rate, seconds = POLLING
    for in_flight in (0, IN_FLIGHT):
        with scene.books(place) as (home, books):
            ids = books.seed("eachlabs", rate * seconds)
            books.fill_in_flight(in_flight)
            requests = [scene.callback("eachlabs", *pair) for pair in ids]
            with scene.submitting(home, books, bench.jwks_url, {}) as server:
                load(server, requests[:1])
                answers = run(drip(server.port, requests[1:], rate))
                memory = megabytes(server)
            name = f"{books.engine}: accept while polling {in_flight:,}"
            found = waits(answers.latencies)
            tell(name, f"{answers.rate:,.0f}", *found, "", "", "", memory)


def blocking(_: Bench, place: Database | None) -> None:
    """Measure how long the store blocks the event loop while callbacks come as fast as possible."""
    with scene.books(place) as (_home, books):
        ids = books.seed("eachlabs", ACCEPTS)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            turns = runner.run(_turns(books, ids))
    name = f"{books.engine}: the store on the loop, {1e3 * max(turns):.1f} ms at most"
    tell(name, "", *waits([turn for turn in turns if turn > IDLE]))


async def _turns(books: scene.Books, ids: Sequence[tuple[str, str]]) -> list[float]:
    store = books.store()
    await store.start()
    feed = iter(ids)
    at: list[float] = []

    async def take() -> None:
        for ours, theirs in feed:
            await accept_outcome(store, _arrival(ours, theirs))

    async def watch() -> None:
        while True:
            at.append(time.perf_counter())
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(take() for _ in range(64)))
    watching.cancel()
    await store.stop()
    return [after - before for before, after in pairwise(at)]


def _arrival(ours: str, theirs: str) -> IncomingOutcome:
    outcome = Outcome(kind="succeeded", provider_id=theirs, output=[Output(url="https://a.test/b")])
    return IncomingOutcome(
        prediction_id=ours,
        provider="eachlabs",
        channel="webhook",
        outcome=outcome,
        at=time.time(),
        judge=_judge,
        body=msgspec.json.encode(outcome),
    )


def _judge(_: CurrentState, __: IncomingOutcome) -> Transition:
    return Transition(
        verdict="accepted",
        status=Status.SUCCEEDED,
        reason="",
        event_type="prediction.succeeded",
        recipients=Recipients(("empty",)),
    )


def save(bench: Bench, place: Database | None) -> None:
    """Store large results with `save`, and with httpx alone, 16 at once as `save` does."""
    with scene.books(place) as (home, books), scene.running(scene.files(home)) as files:
        url = f"http://127.0.0.1:{files.port}/result.mp4"
        if place is None:
            alone = scene.httpx_alone(home, url, FILES)
            _kept("httpx alone: results of 5 MB to files", alone)
        ids = books.seed("eachlabs", FILES)
        requests = [scene.callback("eachlabs", *pair, url=url) for pair in ids]
        serving = scene.receiver(home, books, bench.jwks_url, "save", **scene.SAVING)
        with scene.running(serving) as server:
            began, before = time.perf_counter(), server.cpu()
            load(server, requests)
            done = "SELECT count(*) FROM deliveries WHERE state = 'done'"
            until(lambda: books.ask(done)[0][0] == FILES)
            seconds, cpu = time.perf_counter() - began, server.cpu() - before
            _kept(f"{books.engine}: save, results of 5 MB", (seconds, cpu, server.peak()))


def _kept(name: str, found: tuple[float, float, int]) -> None:
    seconds, cpu, memory = found
    rate = f"{FILES / seconds:.0f}"
    tell(name, rate, "", "", f"{1e6 * cpu / FILES:.0f}", "", "", f"{memory / 1e6:.0f}")


def growth(bench: Bench, place: Database | None) -> None:
    """Accept and deliver with few and with very many predictions stored."""
    for stored in (0, STORED):
        with scene.books(place) as (home, books):
            ids = books.seed("eachlabs", ROUNDS * ACCEPTS // 2)
            books.fill(stored)
            requests = [scene.callback("eachlabs", *pair) for pair in ids]
            serving = scene.receiver(home, books, bench.jwks_url, "empty_handler.py")
            with scene.running(serving) as server:
                name = f"{books.engine}: accept and deliver, {stored:,} stored"
                bench.against_empty(name, server, requests)


def until(is_so: Callable[[], bool], most: float = 300.0) -> None:
    ends = time.monotonic() + most
    while not is_so():
        assert time.monotonic() < ends, f"not so after {most} s"
        time.sleep(0.1)


MEASURES: Final[dict[str, Callable[[Bench, Database | None], None]]] = {
    "accept": accept,
    "submit": submit,
    "deliver": deliver,
    "latency": latency,
    "start": start,
    "polling": polling,
    "blocking": blocking,
    "save": save,
    "growth": growth,
}
