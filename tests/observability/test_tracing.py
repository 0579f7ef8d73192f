"""Traces: one for each prediction, also across restarts; none if tracing is off."""

from __future__ import annotations

import asyncio
import http.server
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from receiver import Context, Event, on
from receiver.model.values import Status, Ticket
from receiver.observability.tracing import Tracing, parent_of
from receiver.settings import Settings
from receiver.store.predictions import Job
from tests.conftest import Logged, Start
from tests.patience import PATIENCE
from tests.receiving import MODELS, SECRETS, Network, breaks, eventually, reply, write

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER: Final = "00f067aa0ba902b7"
TRACEPARENT: Final = f"00-{TRACE}-{CALLER}-01"
UNSAMPLED: Final = f"00-{TRACE}-{CALLER}-00"
ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Memory:
    """A tracer provider that keeps finished spans, in the order of their ends."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    @property
    def names(self) -> list[str]:
        return sorted(span.name for span in self.spans)

    def one(self, name: str, **attributes: object) -> ReadableSpan:
        [found] = [
            span
            for span in self.spans
            if span.name == name and attributes.items() <= dict(span.attributes or {}).items()
        ]
        return found

    def text(self) -> str:
        return "".join(span.to_json() for span in self.spans)


def ids(span: ReadableSpan) -> tuple[str, str, str | None]:
    """Return the ids of a span's trace, of the span, and of its parent."""
    parent = span.parent and trace.format_span_id(span.parent.span_id)
    return (
        trace.format_trace_id(span.context.trace_id),
        trace.format_span_id(span.context.span_id),
        parent,
    )


def fails_with(span: ReadableSpan) -> object:
    is_error = span.status.status_code is trace.StatusCode.ERROR
    assert is_error == ("error.type" in (span.attributes or {}))
    return (span.attributes or {}).get("error.type")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Simulate a program that has its own tracer provider."""
    memory = Memory()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: memory.provider)
    return memory


def recording(requests: list[httpx.Request]) -> Callable[[httpx.Request], httpx.Response]:
    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200)

    return answer


@on("succeeded", name="announce", provider="eachlabs")
async def announce(event: Event, ctx: Context) -> None:
    await ctx.http.post("https://chat.test/post?token=a-chat-token", json={"id": event.id})


@on("succeeded", name="again", provider="eachlabs")
def again(event: Event, ctx: Context) -> None:
    assert event.id
    ctx.submit("fal", MODELS["fal"], {"prompt": "and another"})


async def test_prediction_is_one_trace_across_a_restart(
    start: Start, network: Network, memory: Memory
) -> None:
    sent_on: list[httpx.Request] = []
    others = httpx.MockTransport(recording(sent_on))
    async with start(announce) as station:
        made = await station.submit(headers={"traceparent": TRACEPARENT})
        kept = station.one("SELECT trace FROM predictions WHERE id = ?", made["id"])
    sent = network.sent[0]
    async with start(announce, others=others) as station:
        await station.push(sent)
        await eventually(lambda: "handler announce" in memory.names)

    root = memory.one("POST /v1/predictions")
    assert ids(root)[::2] == (TRACE, CALLER)
    assert kept == f"00-{TRACE}-{ids(root)[1]}-01"
    for name in ("submit eachlabs", "outcome eachlabs", "handler announce"):
        assert ids(memory.one(name))[::2] == (TRACE, ids(root)[1]), name
        assert (memory.one(name).attributes or {})["receiver.prediction"] == made["id"]
    asked = memory.one("POST", **{"server.address": "providers.test"})
    assert ids(asked)[::2] == (TRACE, ids(memory.one("submit eachlabs"))[1])
    chat = memory.one("POST", **{"server.address": "chat.test"})
    assert ids(chat)[::2] == (TRACE, ids(memory.one("handler announce"))[1])
    assert sent_on[0].headers["traceparent"] == f"00-{TRACE}-{ids(chat)[1]}-01"
    assert not [call for _, call in network.calls if "traceparent" in call.headers]
    kinds = {span.name: span.kind.name for span in memory.spans}
    assert kinds["POST /v1/predictions"] == "SERVER"
    assert (kinds["outcome eachlabs"], kinds["POST"]) == ("CONSUMER", "CLIENT")
    assert not [fails_with(span) for span in memory.spans if fails_with(span)]
    for secret in (*SECRETS, sent.token, sent.secret, "a-chat-token", "lighthouse"):
        assert secret not in memory.text()


async def test_chained_prediction_is_in_the_trace_of_its_parent(
    start: Start, network: Network, memory: Memory
) -> None:
    async with start(again) as station:
        await station.push(await station.submitted("eachlabs"))
        await eventually(lambda: {"handler again", "submit fal"} <= set(memory.names))
        trace_of_child = station.one("SELECT trace FROM predictions WHERE parent_id IS NOT NULL")
    handler = ids(memory.one("handler again"))
    assert trace_of_child.startswith(f"00-{handler[0]}-{handler[1]}-")
    assert ids(memory.one("submit fal"))[::2] == handler[:2]
    assert handler[0] == ids(memory.one("POST /v1/predictions"))[0]
    assert network.sent[1].provider == "fal"


@pytest.mark.usefixtures("on_sqlite")
async def test_polls_are_traced_and_the_outcome_is_linked_to_its_poll(
    start: Start, network: Network, memory: Memory
) -> None:
    network.script("eachlabs.poll", reply(text="what?"))
    network.always("eachlabs.poll", network.ends)
    async with start(RECEIVER_POLL_AFTER="0.01") as station:
        made = await station.submit()
        await station.until(made["id"], "succeeded")
        # The span ends after the commit.
        await eventually(lambda: memory.names.count("poll eachlabs") > 1)
    first, last = (span for span in memory.spans if span.name == "poll eachlabs")
    assert (fails_with(first), fails_with(last)) == ("Unreadable", None)
    outcome = memory.one("outcome eachlabs")
    assert outcome.kind.name == "INTERNAL"
    assert [link.context.span_id for link in outcome.links] == [last.context.span_id]


async def test_log_lines_carry_trace_and_span_ids(
    start: Start, memory: Memory, logged: Logged
) -> None:
    async with start(announce, others=httpx.MockTransport(recording([]))) as it:
        await it.push(await it.submitted("eachlabs", headers={"traceparent": TRACEPARENT}))
        await eventually(lambda: "handler announce" in memory.names)
    for event, name in (
        ("submit.accepted", "submit eachlabs"),
        ("outcome.taken", "outcome eachlabs"),
        ("handler.attempt", "handler announce"),
    ):
        [line] = [line for line in logged if line["event"] == event]
        assert (line["trace_id"], line["span_id"]) == ids(memory.one(name))[:2]
    assert "trace_id" not in logged[-1]


async def test_rejected_requests_and_duplicate_callbacks_make_no_spans(
    start: Start, network: Network, memory: Memory
) -> None:
    async with start() as station:
        sent = await station.submitted("eachlabs")
        fal = await station.submitted("fal", "another")
        before = len(memory.spans)
        forged = write(network, sent)
        forged.headers[-1] = ("x-webhook-secret", "guessed")
        other = write(network, fal, body=b'{"request_id": "fal-9", "status": "OK", "payload": {}}')
        astray = write(network, sent)
        astray.path += "x"
        for callback in (forged, other, astray):
            callback.headers.append(("traceparent", TRACEPARENT))
            assert (await station.post(callback)).status_code == 401
        stranger = await station.world.post("/v1/predictions", headers={"traceparent": TRACEPARENT})
        assert stranger.status_code == 401
        assert len(memory.spans) == before
        for _ in range(3):
            assert (await station.push(sent)).status_code == 200
        assert memory.names.count("outcome eachlabs") == 1
        assert len(memory.spans) == before + 1


@on("*", name="fails")
async def fail(event: Event, ctx: Context) -> None:
    del ctx
    raise ValueError(f"a secret of {event.prediction.input['prompt']}")


@pytest.mark.usefixtures("on_sqlite")
async def test_spans_record_the_type_of_an_error_but_not_its_message(
    start: Start, network: Network, memory: Memory
) -> None:
    network.script("fal.submit", reply({"detail": "no such lighthouse"}, 422))
    network.script("eachlabs.submit", breaks(httpx.ReadTimeout))
    async with start(fail, RECEIVER_RETRY_ATTEMPTS="1") as station:
        refused = await station.http.post(
            "/v1/predictions", json={"provider": "unknown", "model": "m", "input": {}}
        )
        assert refused.status_code == 422
        await station.submit("eachlabs")
        await station.submit("fal")
        await eventually(lambda: "handler fails" in memory.names)
    bad, *good = (span for span in memory.spans if span.name == "POST /v1/predictions")
    assert [fails_with(span) for span in (bad, *good)] == [None] * 3
    assert (bad.attributes or {})["http.response.status_code"] == 422
    sent = [span for span in memory.spans if span.name == "POST"]
    assert [fails_with(span) for span in sent] == ["ReadTimeout", "422"]
    assert fails_with(memory.one("submit eachlabs")) == "unconfirmed"
    assert fails_with(memory.one("submit fal")) == "rejected"
    attempt = memory.one("handler fails")
    assert fails_with(attempt) == "ValueError"
    [said] = attempt.events
    assert "in fail" in str((said.attributes or {})["exception.stacktrace"])
    assert "lighthouse" not in memory.text()


async def test_queued_submit_is_not_in_the_trace_of_another_request(
    start: Start, memory: Memory
) -> None:
    async with start(EACHLABS_MAX_IN_FLIGHT="1") as station:
        first = await station.submit(prompt="first")
        second = await station.submit(prompt="second")
        station.edit(f"UPDATE predictions SET trace = NULL WHERE id = '{second['id']}'")
        station.edit(
            "UPDATE predictions SET status = 'failed', due_at = NULL, completed_at = created_at,"
            f" error_code = 'timeout', error_message = '' WHERE id = '{first['id']}'"
        )
        before = len(memory.spans)
        await station.submit(prompt="third")
        await station.until(second["id"], "processing")
        assert [span.name for span in memory.spans[before:]] == ["POST /v1/predictions"]


HOSTILE: Final = (
    "", "00", TRACEPARENT[:-1], TRACEPARENT.upper(), f"ff{TRACEPARENT[2:]}", f"{TRACEPARENT}-more",
    f"00-{'0' * 32}-{CALLER}-01", f"00-{TRACE}-{'0' * 16}-01", "00-" + "9" * 60_000, "é", "x" * 513,
    f"{TRACEPARENT}, {TRACEPARENT}", "' OR 1=1 --",
)  # fmt: skip


@pytest.mark.usefixtures("on_sqlite")
async def test_malformed_traceparent_is_ignored(start: Start, memory: Memory) -> None:
    async with start(EACHLABS_MAX_IN_FLIGHT="none", EACHLABS_REQUESTS_PER_MINUTE="none") as it:
        for given_ in HOSTILE:
            headers: Any = [(b"traceparent", given_.encode()), (b"tracestate", b"," * 999)]
            made = await it.submit(headers=headers)
            [(kept,)] = it.rows("SELECT trace FROM predictions WHERE id = ?", made["id"])
            assert TRACE not in kept
        made = await it.submit(headers={"traceparent": UNSAMPLED})
        kept = it.one("SELECT trace FROM predictions WHERE id = ?", made["id"])
    roots = [span for span in memory.spans if span.name == "POST /v1/predictions"]
    assert [span.parent for span in roots] == [None] * len(HOSTILE)
    assert len({span.context.trace_id for span in roots}) == len(HOSTILE)
    assert kept.startswith(f"00-{TRACE}-")
    assert kept.endswith("-00")


@given(st.none() | st.text() | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{32}-.*", fullmatch=True))
def test_any_traceparent_gives_a_valid_context_or_none(text: str | None) -> None:
    context = parent_of(text)
    assert context is None or trace.get_current_span(context).get_span_context().is_valid


# --- on and off ---


@pytest.mark.usefixtures("on_sqlite")
async def test_request_span_is_a_child_of_the_embedding_programs_span(
    start: Start, memory: Memory
) -> None:
    tracer = memory.provider.get_tracer("program")
    async with start() as station:
        with tracer.start_as_current_span("outside"):
            sent = await station.submitted("eachlabs", headers={"traceparent": TRACEPARENT})
        with tracer.start_as_current_span("callback") as callback:
            await station.push(sent)
    root = memory.one("POST /v1/predictions")
    assert ids(root)[::2] == ids(memory.one("outside"))[:2]
    assert root.kind.name == "INTERNAL"
    outcome = memory.one("outcome eachlabs")
    assert ids(outcome)[0] == ids(root)[0]
    assert [link.context for link in outcome.links] == [callback.get_span_context()]


@pytest.mark.usefixtures("on_sqlite")
async def test_otel_sdk_disabled_turns_tracing_off(
    start: Start, memory: Memory, logged: Logged
) -> None:
    async with start(OTEL_SDK_DISABLED="true", **{ENDPOINT: "http://127.0.0.1:9"}) as station:
        await station.push(await station.submitted("eachlabs"))
        assert station.one("SELECT trace FROM predictions") is None
    assert not memory.spans
    assert [line["tracing"] for line in logged if line["event"] == "receiver.started"] == [False]


def test_opentelemetry_sdk_is_not_imported_unless_configured(tmp_path: Any) -> None:
    script = """
import asyncio, sys
from receiver import create_app
app = create_app()
async def main():
    async with app.router.lifespan_context(app):
        assert not {"opentelemetry.sdk", "receiver.observability.exporters"} & set(sys.modules)
asyncio.run(main())
"""
    env = {"RECEIVER_SECRET_KEY": "x" * 32, "RECEIVER_DATABASE_URL": f"sqlite:///{tmp_path}/a.db"}
    subprocess.run([sys.executable, "-c", script], env=env, check=True, timeout=PATIENCE)


@pytest.mark.parametrize(
    ("env", "exporters"),
    [
        ({}, ()),
        ({ENDPOINT: "http://a"}, ("otlp_proto_http",)),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://a"}, ("otlp_proto_http",)),
        ({"OTEL_TRACES_EXPORTER": "console, otlp"}, ("console", "otlp_proto_http")),
        ({ENDPOINT: "http://a", "OTEL_TRACES_EXPORTER": "none"}, ()),
        ({ENDPOINT: "http://a", "OTEL_SDK_DISABLED": "TRUE"}, None),
        ({ENDPOINT: "http://a", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ("otlp_proto_grpc",)),
        ({ENDPOINT: "a:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ("otlp_proto_grpc",)),
        ({ENDPOINT: "http://a", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "other"}, ("other",)),
    ],
)
def test_otel_settings_select_the_trace_exporters(
    env: dict[str, str], exporters: tuple[str, ...] | None
) -> None:
    assert Settings.read({"RECEIVER_SECRET_KEY": "x" * 32, **env}).trace_exporters == exporters


@pytest.mark.usefixtures("on_sqlite")
async def test_missing_otel_extra_is_reported_at_start_and_receiver_works(
    start: Start, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    monkeypatch.delitem(sys.modules, "receiver.observability.exporters", raising=False)
    async with start(**{ENDPOINT: "http://127.0.0.1:9"}) as station:
        assert (await station.push(await station.submitted("eachlabs"))).status_code == 200
    [problem] = [line["problem"] for line in logged if "traces" in line.get("problem", "")]
    assert "pip install 'prediction-receiver[otel]'" in problem


@pytest.mark.usefixtures("on_sqlite")
@pytest.mark.parametrize(
    ("name", "room", "problem"),
    [("zipkin", "9", "no exporter named zipkin"), ("otlp", "-1", "begin with OTEL_")],
)
async def test_unusable_exporter_is_reported_at_start(
    name: str,
    room: str,
    problem: str,
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    logged: Logged,
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", room)
    async with start(OTEL_TRACES_EXPORTER=name) as station:
        await station.submit()
    [said] = [line["problem"] for line in logged if "traces" in line.get("problem", "")]
    assert problem in said


def test_malformed_stored_trace_does_not_break_a_poll(memory: Memory) -> None:
    tracing = Tracing()
    tracing.start(())
    assert tracing.on
    job = Job(
        ticket=Ticket(id="pred_1", model="m", mode="queue", input={}),
        provider="fal",
        status=Status.PROCESSING,
        submits=1,
        polls=0,
        deadline_at=None,
        latest_at=None,
        held_until=None,
        trace="nonsense",
    )
    with tracing.poll(job) as span:
        span.note(result="ended")
    assert not span.ids
    assert not memory.spans


# --- the collector ---


@contextmanager
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Run an OTLP collector on loopback that keeps the bodies it receives."""
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            assert self.headers["content-type"] == "application/x-protobuf"
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", bodies
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("on_sqlite")
@pytest.mark.parametrize(("service", "name"), [("", "receiver"), ("pictures", "pictures")])
async def test_collector_receives_the_trace_over_otlp(
    service: str, name: str, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector() as (url, bodies):
        monkeypatch.setenv(ENDPOINT, url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", service)
        others = httpx.MockTransport(recording([]))
        async with start(announce, others=others, **{ENDPOINT: url}) as station:
            sent = await station.submitted("eachlabs", headers={"traceparent": TRACEPARENT})
            await station.push(sent)
            await eventually(
                lambda: station.rows("SELECT state FROM deliveries"), lambda it: it == [("done",)]
            )
    spans = []
    for body in bodies:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {a.key: a.value.string_value for a in resource.resource.attributes}
            assert named["service.name"] == name
            spans += [span for scope in resource.scope_spans for span in scope.spans]
    assert {span.trace_id.hex() for span in spans} == {TRACE}
    [root] = [span for span in spans if span.parent_span_id.hex() == CALLER]
    assert sorted(span.name for span in spans if span.parent_span_id == root.span_id) == [
        "handler announce",
        "outcome eachlabs",
        "submit eachlabs",
    ]
    assert not [secret for secret in SECRETS if secret.encode() in b"".join(bodies)]


@pytest.mark.usefixtures("on_sqlite")
async def test_hanging_collector_does_not_block_callbacks(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv(ENDPOINT, url)
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4")
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "3600")  # so the export does not time out
        async with asyncio.timeout(PATIENCE), start(**{ENDPOINT: url}) as station:
            for number in range(5):
                sent = await station.submitted("eachlabs", f"prompt {number}")
                assert (await station.push(sent)).status_code == 200
