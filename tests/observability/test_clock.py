"""Due times and deadlines follow a step of the wall clock, so it delays and expires nothing."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from receiver import Context, Event, Retry, create_app, on
from receiver.model.values import Shift
from receiver.observability import clock as clocks
from receiver.observability.clock import SteadyClock
from receiver.settings import Settings
from tests.conftest import Logged
from tests.patience import PATIENCE
from tests.receiving import API_KEY, ENV, STRANGER, Clock, Network, Station, eventually, reply

pytestmark = pytest.mark.anyio

HOUR: Final = 3600.0


@pytest.fixture(autouse=True)
def _watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check for a clock step often."""
    monkeypatch.setattr(clocks, "_EVERY", 0.01)


@asynccontextmanager
async def station(folder: Path, *handlers: Any, **env: str) -> AsyncIterator[Station]:
    """Run a receiver whose wall clock can be set."""
    path, clock, network = folder / "receiver.db", Clock(), Network()
    settings = Settings.read({**ENV, "RECEIVER_DATABASE_URL": f"sqlite:///{path}", **env})
    app = create_app(settings, handlers, clock=clock, monotonic=time.monotonic, transport=network)
    key = {"authorization": f"Bearer {API_KEY}"}
    transport = httpx.ASGITransport(app, client=STRANGER)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="https://hooks.test", headers=key) as http,
    ):
        yield Station(app, network, path, clock, http, http)


def steps(logged: Logged) -> list[float]:
    """Return the steps that the receiver has logged; several if it was paused during one."""
    return [line["seconds"] for line in logged if line["event"] == "clock.stepped"]


async def set_clock(station: Station, logged: Logged, seconds: float) -> None:
    """Step the wall clock, and wait until the receiver follows."""
    station.clock.ahead += seconds
    # The two clocks are read one after the other, and a busy machine may pause between.
    await eventually(
        lambda: sum(steps(logged)), lambda total: total == pytest.approx(seconds, abs=PATIENCE)
    )


STEPS: Final = pytest.mark.parametrize("step", [-HOUR, HOUR, -30 * HOUR, 30 * HOUR])


@STEPS
async def test_poll_due_time_and_deadline_follow_a_clock_step(
    tmp_path: Path, logged: Logged, step: float
) -> None:
    async with station(tmp_path, RECEIVER_POLL_AFTER="1") as run:
        sent = await run.submitted("fal")
        [(before, deadline)] = run.rows("SELECT due_at, deadline_at FROM predictions")
        await set_clock(run, logged, step)
        # A poll that is under way may still write one due time by the old clock.
        await eventually(
            lambda: run.one("SELECT due_at FROM predictions"),
            lambda due_at: due_at - before == pytest.approx(step, abs=90),
        )
        # A step is logged in tenths of a second, and before the rows are changed.
        await eventually(
            lambda: run.one("SELECT deadline_at FROM predictions") - deadline - sum(steps(logged)),
            lambda rest: rest == pytest.approx(0, abs=0.1 * len(steps(logged))),
        )
        run.network.always("fal.poll", run.network.ends)
        await run.until(sent.prediction_id, "succeeded")


@STEPS
async def test_postponed_submit_is_sent_after_a_clock_step(
    tmp_path: Path, logged: Logged, step: float
) -> None:
    async with station(tmp_path) as run:
        run.network.script("fal.submit", reply({}, 503), reply({}, 429, retry_after="1"))
        made = await run.submit("fal")
        await set_clock(run, logged, step)
        found = await run.until(made["id"], "processing")
        assert found["error"] is None


@STEPS
async def test_delivery_is_retried_after_a_clock_step(
    tmp_path: Path, logged: Logged, step: float
) -> None:
    ran = []

    @on("*", retry=Retry(base=0.5, cap=0.5))
    async def fails_once(event: Event, _ctx: Context) -> None:
        ran.append(event.id)
        if len(ran) == 1:
            raise ValueError("once")

    async with station(tmp_path, fails_once) as run:
        await run.submit("fal", mode="sync")
        await eventually(lambda: ran)
        await set_clock(run, logged, step)
        await eventually(lambda: len(ran) == 2)
        assert (await run.http.get("/readyz")).status_code == 200


async def test_rate_limit_counts_follow_a_clock_step_back(tmp_path: Path, logged: Logged) -> None:
    async with station(tmp_path, FAL_REQUESTS_PER_MINUTE="1") as run:
        await run.submitted("fal", "first")
        await set_clock(run, logged, -HOUR)
        await eventually(
            lambda: run.rows("SELECT max(at) FROM requests"),
            lambda rows: rows[0][0] <= run.clock(),
        )


# --- the steady clock alone ---


class Clocks:
    """A computer's clocks, as the test sets them."""

    def __init__(self) -> None:
        self.wall = 1_000_000.0
        self.monotonic = 100.0
        self.suspended = 0.0
        self.steady = SteadyClock(lambda: self.wall, lambda: self.monotonic, lambda: self.suspended)

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


def test_steady_clock_ignores_a_step_until_it_is_followed() -> None:
    computer = Clocks()
    computer.pass_(5.0)
    computer.wall -= HOUR
    computer.pass_(5.0)
    assert computer.steady() == 1_000_010.0
    step = computer.steady.step()
    assert step == Shift(due=-HOUR, deadline=-HOUR)
    computer.steady.follow(step)
    assert computer.steady() == computer.wall
    assert computer.steady.step() is None


def test_slow_drift_is_followed_without_a_step() -> None:
    computer = Clocks()
    for _ in range(100):
        computer.wall += 0.9
        assert computer.steady.step() is None
    assert computer.steady() == pytest.approx(computer.wall)


def test_suspend_moves_deadlines_but_not_due_times() -> None:
    computer = Clocks()
    computer.wall += 8 * HOUR
    computer.suspended += 8 * HOUR
    step = computer.steady.step()
    assert step == Shift(due=0.0, deadline=8 * HOUR)
    computer.steady.follow(step)
    computer.wall += HOUR
    assert computer.steady.step() == Shift(due=HOUR, deadline=HOUR)


def test_clock_set_during_suspend_moves_due_times_and_deadlines() -> None:
    computer = Clocks()
    computer.wall += 3 * HOUR
    computer.suspended += HOUR
    assert computer.steady.step() == Shift(due=2 * HOUR, deadline=3 * HOUR)
