"""`GET /metrics` of a working receiver, and the dashboard and the alerts that use it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from receiver import Dead, Event, on
from receiver.deliveries.importing import register
from receiver.deliveries.registry import Registry
from receiver.http.routes.metrics import MetricsPage
from receiver.model.errors import StoreUnavailable
from receiver.observability.events import Telemetry
from receiver.observability.runtime import Runtime
from receiver.settings import Settings
from receiver.store.backlog import Backlog, BacklogReader
from tests.conftest import Disk, Start
from tests.forked import run_to_end
from tests.patience import PATIENCE
from tests.receiving import ENV, Clock, Station, breaks, eventually, write

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

Labels = frozenset[tuple[str, str]]
Samples = dict[tuple[str, Labels], float]

TOP: Final = Path(__file__).parent.parent.parent
DASHBOARD: Final = TOP / "deploy/grafana/receiver.json"
ALERTS: Final = TOP / "deploy/prometheus/alerts.yml"


@pytest.fixture(autouse=True)
def pages_are_made_for_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FRESH", "_SHARE"):
        monkeypatch.setattr(f"receiver.http.routes.metrics.{name}", 0.0)


def read(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(samples: Samples, name: str, **labels: str) -> float:
    """Return the sum of a metric's samples that have at least these labels."""
    wanted = set(labels.items())
    found = [
        value for (named, given), value in samples.items() if named == name and wanted <= given
    ]
    assert found, f"{name} {labels} is not on the page"
    return sum(found)


async def page(station: Station) -> Samples:
    answer = await station.world.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "_created" not in answer.text
    return read(answer.text)


async def at_work(station: Station) -> None:
    """Make everything happen that is counted."""
    network = station.network
    sent = await station.submitted("eachlabs", "one")
    await station.push(sent)
    await station.push(sent)
    await station.push(sent, ok=False)
    callback = write(network, sent)
    callback.body += b" "
    callback.headers = [("x-webhook-secret", "wrong")]
    await station.post(callback)
    await station.world.post("/webhooks/fal/nonsense", content=b"{}")
    await station.world.post("/webhooks/missing/nonsense", content=b"{}")
    network.script("fal.submit", breaks(httpx.ReadTimeout))
    await station.submit("fal", "two")
    await eventually(lambda: network.streams)
    network.script("oxen.poll", network.ends)
    station.clock.ahead += 60
    asked = await station.submit("oxen", "three")
    station.clock.ahead += 60
    await station.submit("oxen", "four")
    await station.until(asked["id"], "succeeded")


@on("succeeded", name="greets")
async def greet(_: Event) -> None: ...


@on("succeeded", name="refuses")
async def refuse(_: Event) -> None:
    raise Dead("no")


@pytest.mark.usefixtures("on_sqlite")
async def test_every_metric_of_the_dashboard_and_the_alerts_is_counted(
    start: Start, tmp_path: Path
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text('["*"]\nimage = 0.04\n')
    limits = (
        '[{"by": "all", "per": "month", "cost": 0.20}, {"by": "all", "per": "day", "count": 9}]'
    )
    clock = Clock()
    clock.ahead = 43_200 - clock() % 86_400  # noon in UTC, so that the test does not cross midnight
    settings = {"RECEIVER_PRICES": str(prices), "RECEIVER_LIMITS": limits}
    async with start(greet, refuse, clock=clock, **settings) as station:
        await at_work(station)
        await eventually(
            lambda: page(station),
            lambda found: of(found, "receiver_deliveries_ended_total") == 4,
        )
        found = await page(station)
    webhook = {"provider": "eachlabs", "channel": "webhook"}
    for verdict in ("accepted", "duplicate", "late"):
        assert of(found, "receiver_outcomes_total", **webhook, verdict=verdict) == 1
    rejected = "receiver_callbacks_rejected_total"
    assert of(found, rejected, provider="eachlabs", reason="bad_secret") == 1
    assert of(found, rejected, provider="fal", reason="bad_token") == 1
    assert of(found, rejected, provider="unknown", reason="unknown_provider") == 1
    assert of(found, "receiver_submits_total", provider="eachlabs", result="accepted") == 1
    assert of(found, "receiver_submits_total", provider="fal", result="unconfirmed") == 1
    assert of(found, "receiver_submits_total", provider="fal", result="rejected") == 0
    assert of(found, "receiver_polls_total", provider="oxen", result="ended") == 1
    assert of(found, "receiver_outcome_wait_seconds_count", channel="webhook") == 1
    assert of(found, "receiver_outcome_wait_seconds_count", channel="poll") == 1
    assert of(found, "receiver_outcome_wait_seconds_sum", channel="poll") >= 60
    attempts = "receiver_handler_attempts_total"
    assert of(found, attempts, handler="greets", result="done") == 2
    assert of(found, attempts, handler="refuses", result="dead") == 2
    assert of(found, "receiver_handler_attempt_seconds_count", handler="greets") == 2
    assert of(found, "receiver_deliveries_ended_total", handler="refuses", state="dead") == 2
    assert of(found, "receiver_deliveries_ended_total", handler="greets", state="dead") == 0
    assert of(found, "receiver_writer_batch_size_count") > 4
    assert of(found, "receiver_database_available") == 1
    assert of(found, "receiver_stream_connected", provider="oxen") == 1
    assert of(found, "receiver_deliveries_pending", handler="greets") == 0
    living = "receiver_predictions_living"
    assert of(found, living, provider="fal", status="unconfirmed") == 1
    assert of(found, living, provider="oxen", status="processing") == 1
    assert of(found, "receiver_cost_today_dollars", provider="eachlabs") == 0.04
    assert of(found, "receiver_cost_unknown_today", provider="eachlabs") == 0
    used = "receiver_budget_used_ratio"
    assert of(found, used, budget="all/month") == pytest.approx(0.8)
    assert sum(name == used for name, _ in found) == 1
    hook = "/webhooks/{provider}/{token}"
    assert of(found, "receiver_requests_total", route=hook, status="200") == 3
    assert of(found, "receiver_requests_total", route=hook, status="401") == 2

    named = {name for name, _ in found}
    expressions = [*panels(), *(rule["expr"] for rule in rules())]
    asked = {name for text in expressions for name in re.findall(r"\breceiver_\w+", text)}
    assert asked <= named
    assert {name for name in named if name.startswith("receiver_")} - asked <= {
        f"{name}_{part}"
        for name in ("receiver_outcome_wait_seconds", "receiver_handler_attempt_seconds")
        for part in ("count", "sum")
    }
    for text in expressions:
        check_labels(text, found)


def panels() -> Iterator[str]:
    """Yield the query of every panel."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == "${datasource}"
            yield target["expr"]


def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(ALERTS.read_text())["groups"]
    return list(group["rules"])


def check_labels(expression: str, found: Samples) -> None:
    """Check that a query uses only labels that its metrics have."""
    pairs = Counter("()[]{}".index(mark) for mark in expression if mark in "()[]{}")
    assert all(pairs[mark] == pairs[mark + 1] for mark in (0, 2, 4)), expression
    given = {
        label
        for name, labels in found
        if name in re.findall(r"\breceiver_\w+", expression)
        for label, _ in labels
    }
    grouped = re.findall(r"by \(([^)]*)\)", expression)
    wanted = {label.strip() for group in grouped for label in group.split(",")}
    wanted |= set(re.findall(r"(\w+)(?:=~|!~|=|!=)\"", expression))
    assert wanted <= given | {"job"}, expression


def test_all_six_alerts_have_a_severity_and_instructions() -> None:
    assert len({rule["alert"] for rule in rules()}) == len(rules()) == 6
    for rule in rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+m", rule["for"])
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert set(rule["annotations"]) == {"summary", "description"}
        assert len(rule["annotations"]["description"]) > 100


def test_dashboard_panels_have_unique_ids_and_do_not_overlap() -> None:
    board = json.loads(DASHBOARD.read_text())
    [variable] = board["templating"]["list"]
    assert (variable["name"], variable["type"]) == ("datasource", "datasource")
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    places = [panel["gridPos"] for panel in board["panels"]]
    taken = Counter(
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    )
    assert max(taken.values()) == 1
    assert max(x for x, _ in taken) < 24


async def test_backlog_metrics_of_every_process_count_pending_rows_and_their_age(
    start: Start,
) -> None:
    async with start(greet, dispatch=False) as station:
        for prompt in ("one", "two"):
            await station.push(await station.submitted("eachlabs", prompt))
        await station.submit("fal", "three")
        first = await page(station)
        station.clock.ahead += 100
        later = await page(station)
    async with start(greet, dispatch=False) as station:
        elsewhere = await page(station)
    for found in (first, later, elsewhere):
        assert of(found, "receiver_deliveries_pending", handler="greets", state="pending") == 2
        assert of(found, "receiver_deliveries_pending", handler="greets", state="running") == 0
        assert of(found, "receiver_predictions_living", provider="fal", status="processing") == 1
    for found in (first, later):
        assert of(found, "receiver_writer_batch_size_count") > 0
    assert of(first, "receiver_oldest_pending_delivery_age_seconds", handler="greets") < PATIENCE
    assert (
        99
        < of(later, "receiver_oldest_pending_delivery_age_seconds", handler="greets")
        < 100 + PATIENCE
    )


async def test_text_from_clients_never_becomes_a_label(start: Start) -> None:
    async with start() as station:

        async def strange(word: str) -> None:
            await station.world.post(f"/webhooks/{word}/{word}", content=word)
            await station.world.post(f"/webhooks/fal/{word}", content=word)
            await station.world.get(f"/{word}", headers={"x-request-id": word, "user-agent": word})
            await station.world.get(f"/v1/predictions/{word}?status={word}")
            await station.http.get(f"/v1/predictions/{word}")
            await station.http.get(f"/v1/models/{word}/{word}")
            body = {"provider": word, "model": word, "input": {}}
            await station.http.post("/v1/predictions", json=body)

        await strange("word0")
        await page(station)
        first = await page(station)
        for number in range(1, 10):
            await strange(f"word{number}")
        later = await page(station)
    assert {key for key in later if key[0].startswith("receiver_")} == {
        key for key in first if key[0].startswith("receiver_")
    }
    assert "word" not in repr(list(later))


@pytest.mark.usefixtures("on_sqlite")
async def test_full_disk_is_reported_as_database_unavailable(start: Start, disk: Disk) -> None:
    async with start() as station:
        assert of(await page(station), "receiver_database_available") == 1
        disk.full = True
        await station.world.get("/readyz")
        assert of(await page(station), "receiver_database_available") == 0
        disk.full = False
        assert (await station.world.get("/readyz")).status_code == 200
        assert of(await page(station), "receiver_database_available") == 1


@pytest.mark.usefixtures("on_sqlite")
async def test_handlers_that_were_loaded_again_are_on_the_page(start: Start) -> None:
    async with start(refuse) as station:
        await station.app.state.exchange(register([greet]), Settings.read(ENV))
        assert of(await page(station), "receiver_deliveries_pending", handler="greets") == 0


class Away(BacklogReader):
    """A database that is unavailable, or hangs."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.asked = 0
        self._hangs = hangs

    async def depth(self, providers: Sequence[str], before: float = 0.0) -> Backlog:
        del providers, before
        self.asked += 1
        if self._hangs:
            await asyncio.Event().wait()
        raise StoreUnavailable("away")


def make_page(backlog: Away) -> MetricsPage:
    parts: Any = SimpleNamespace(
        store=SimpleNamespace(backlog=backlog),
        predictions=SimpleNamespace(locked=list),
        deliveries=SimpleNamespace(registry=Registry()),
        runtime=Runtime(),
    )
    return MetricsPage(parts)


@pytest.mark.parametrize("hangs", [False, True])
async def test_metrics_page_is_served_while_the_database_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, *, hangs: bool
) -> None:
    monkeypatch.setattr("receiver.http.routes.metrics._PATIENCE", 0.05)
    away = Away(hangs=hangs)
    found = read(bytes((await make_page(away).answer()).body).decode())
    assert away.asked == 1
    assert of(found, "receiver_database_available") == 0
    assert of(found, "receiver_writer_batch_size_count") == 0
    names = {name for name, _ in found}
    assert not names & {"receiver_deliveries_pending", "receiver_stream_connected"}


async def test_metrics_page_is_cached_and_concurrent_requests_share_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("receiver.http.routes.metrics._FRESH", 60.0)
    away = Away()
    page = make_page(away)
    bodies = await asyncio.gather(*(page.answer() for _ in range(20)))
    assert len({answer.body for answer in bodies}) == 1
    await page.answer()
    assert away.asked == 1


COUNTS: Final = """
import sys
from receiver.observability.metrics import Metrics
from receiver.observability.events import Telemetry
telemetry = Telemetry()
telemetry.refused("fal", "bad_token")
telemetry.batch(7)
sys.stdout.buffer.write(telemetry.metrics.expose(()))
"""


def test_multiprocess_folder_gives_the_sum_of_all_processes(tmp_path: Path) -> None:
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "made" / "for-it")}
    for name in [name for name in env if name.startswith("COV_")]:
        del env[name]
    for number in (1, 2):
        ran = subprocess.run(
            [sys.executable, "-c", COUNTS],
            env=env,
            cwd=TOP,
            capture_output=True,
            timeout=PATIENCE,
            check=True,
        )
        found = read(ran.stdout.decode())
        assert of(found, "receiver_callbacks_rejected_total", reason="bad_token") == number
        assert of(found, "receiver_writer_batch_size_count") == number
        assert of(found, "receiver_writer_batch_size_bucket", le="5.0") == 0
        # An empty file, as left by a process that was killed while it created the file.
        (tmp_path / "made" / "for-it" / "counter_0.db").touch()


@pytest.mark.parametrize(
    ("command", "folder"), [("drain", "file/folder"), ("serve --port 0", "a" * 300)]
)
def test_multiprocess_folder_that_cannot_be_created_is_reported(
    tmp_path: Path, command: str, folder: str
) -> None:
    (tmp_path / "file").touch()
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / folder)}
    env |= {"RECEIVER_DEV": "1", "RECEIVER_DATABASE_URL": f"sqlite:///{tmp_path / 'r.db'}"}
    ran = run_to_end(["-m", "receiver", *command.split()], TOP, env)
    assert ran.returncode == 1
    assert "PROMETHEUS_MULTIPROC_DIR" in ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr


async def test_number_of_label_values_is_limited() -> None:
    telemetry = Telemetry()
    for number in range(1100):
        telemetry.refused("fal", f"reason{number}")
    found = read(telemetry.metrics.expose(()).decode())
    refused = [key for key in found if key[0] == "receiver_callbacks_rejected_total"]
    assert len(refused) == 1001
    assert of(found, "receiver_callbacks_rejected_total", reason="other") == 100


def test_plain_import_does_not_import_prometheus_client() -> None:
    script = (
        "import sys, receiver, receiver.cli.main; assert 'prometheus_client' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=TOP, timeout=PATIENCE, check=True)
