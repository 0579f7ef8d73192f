"""Malformed and oversized answers by every channel: readable ones succeed, others give a reason."""

from __future__ import annotations

import asyncio
import itertools
import json
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver import Event, on
from receiver.model.errors import Unreadable
from receiver.predictions.stream import Events
from tests.conftest import Start
from tests.receiving import PICTURE, Answering, Clock, Network, content, eventually, reply

pytestmark = pytest.mark.anyio


def malformed(content: bytes) -> bytes:
    """Add what careless providers send: BOM, NaN, Latin-1, a raw line end, half a surrogate."""
    return b'\xef\xbb\xbf{"score": NaN, "prompt": "caf\xe9\n\\ud800", ' + content.lstrip()[1:]


def answering(content: bytes, status: int = 200) -> Answering:
    return lambda _: httpx.Response(status, content=content)


@pytest.mark.parametrize("provider", ["eachlabs", "fal"])
async def test_callback_of_malformed_json_reaches_handlers_as_strict_json(
    start: Start, provider: str
) -> None:
    seen: list[Event] = []

    @on()
    def keep(event: Event) -> None:
        seen.append(event)

    async with start(keep) as station:
        sent = await station.submitted(provider)
        body = malformed(json.dumps(content(station.network, sent)).encode())
        assert (await station.push(sent, body=body)).status_code == 200
        await eventually(lambda: seen)
        assert [output.url for output in seen[0].prediction.output or []] == [PICTURE]
        assert (seen[0].raw["score"], seen[0].raw["prompt"]) == (None, "caf\xe9\n\ufffd")
        kept = station.one("SELECT body FROM callbacks WHERE verdict = 'accepted'")
        assert bytes(kept) == body


@pytest.mark.parametrize(
    ("provider", "kind", "answer"),
    [
        ("eachlabs", "eachlabs.poll", {"status": "success", "output": [PICTURE]}),
        ("fal", "fal.result", {"images": [{"url": PICTURE}]}),
        ("oxen", "oxen.poll", {"status": "succeeded", "result_url": PICTURE}),
    ],
)
async def test_poll_answer_of_malformed_json_ends_the_prediction(
    start: Start, network: Network, provider: str, kind: str, answer: dict[str, object]
) -> None:
    network.always("fal.poll", reply({"status": "COMPLETED", "error": " "}))
    network.always(kind, answering(malformed(json.dumps(answer).encode())))
    async with start(RECEIVER_POLL_AFTER="0.05") as station:
        prediction = await station.submit(provider)
        found = await station.until(prediction["id"], "succeeded")
        assert [output["url"] for output in found["output"]] == [PICTURE]


@pytest.mark.parametrize("provider", ["oxen", "fal", "eachlabs"])
async def test_malformed_blocking_answer_succeeds_and_a_truncated_one_is_unconfirmed(
    start: Start, network: Network, provider: str
) -> None:
    answer = {"images": [{"url": PICTURE}], "status": "success", "output": PICTURE}
    whole = malformed(json.dumps(answer).encode())
    network.script(f"{provider}.run", answering(whole), answering(whole[:-9]))
    async with start() as station:
        good = await station.submit(provider, mode="sync")
        assert [output["url"] for output in good["output"]] == [PICTURE]
        waiting = asyncio.create_task(station.submit(provider, "broken", mode="sync"))
        statuses = "SELECT status FROM predictions ORDER BY status"
        await eventually(
            lambda: station.rows(statuses),
            lambda rows: rows == [("succeeded",), ("unconfirmed",)],
        )
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_stream_event_of_malformed_json_ends_the_prediction(
    start: Start, network: Network
) -> None:
    async with start() as station:
        sent = await station.submitted("oxen")
        event = {"generation_id": sent.id, "status": "succeeded", "url": PICTURE}
        data = json.dumps(event).replace("{", '{"score": NaN, ', 1)
        for stream in network.streams:
            said = f"\ufeffevent: media_generation_completed\rdata: {data}\r\r"
            stream.send(said.encode())  # without a byte after the last CR
        await eventually(lambda: station.rows("SELECT 1 FROM events WHERE channel = 'sse'"))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (reply({"detail": "User is locked."}, 403), "HTTP 403: User is locked."),
        (reply({"detail": "Invalid key"}, 401), "HTTP 401: Invalid key"),
        (reply(text="the runner is gone", status=500), "HTTP 500: the runner is gone"),
        (reply({}, 404), "fal does not know it (HTTP 404)"),
        (reply(text="", status=204), "not JSON"),
        (reply(text="soon", content_type="text/plain"), "not JSON"),
        (reply({"detail": "Slow down"}, 429), "HTTP 429: Slow down"),
    ],
)
async def test_expired_prediction_has_the_last_poll_error_as_its_message(
    start: Start, network: Network, answer: Answering, words: str
) -> None:
    clock = Clock()
    network.always("fal.poll", reply({"status": "COMPLETED"}))
    network.always("fal.result", answer)
    async with start(clock=clock, RECEIVER_POLL_AFTER="0.05") as station:
        prediction = await station.submit("fal")
        await eventually(lambda: network.count("fal.result"))
        clock.ahead = 4000.0
        await station.http.post("/v1/drain")
        clock.ahead = 8000.0
        await station.http.post("/v1/drain")
        found = await station.until(prediction["id"], "failed")
        assert found["error"]["code"] == "expired"
        assert words in found["error"]["message"]


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        (
            reply({"detail": "Prompt was blocked by the content policy"}, 400),
            "content_policy",
            "Prompt was blocked by the content policy",
        ),
        (answering(b'{"url": "data:' + b"A" * 2**25 + b'"}'), "provider_error", "33554432 bytes"),
        (answering(b"[" + b"[]," * 600_000 + b"1]"), "provider_error", "1000000 values"),
    ],
)
async def test_permanent_error_of_a_result_fails_the_prediction_at_once(
    start: Start, network: Network, answer: Answering, code: str, words: str
) -> None:
    network.always("fal.poll", reply({"status": "COMPLETED"}))
    network.always("fal.result", answer)
    async with start(RECEIVER_POLL_AFTER="0.05") as station:
        prediction = await station.submit("fal")
        found = await station.until(prediction["id"], "failed")
        assert found["error"]["code"] == code
        assert words in found["error"]["message"]
        assert network.count("fal.result") == 1


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_of_hours_postpones_a_submit(
    start: Start, network: Network, status: int
) -> None:
    clock = Clock()
    network.always("eachlabs.submit", reply({"error": "full"}, status, retry_after="7200"))
    async with start(clock=clock, RECEIVER_PREDICTION_TIMEOUT="10000") as station:
        began = clock()
        await station.submit("eachlabs")
        due = "SELECT due_at FROM predictions"
        await eventually(lambda: station.one(due), lambda at: at >= began + 7200)
        assert network.count("eachlabs.submit") == 1


async def test_retry_after_of_a_poll_postpones_the_next_poll(
    start: Start, network: Network
) -> None:
    network.always("eachlabs.poll", reply({}, 503, retry_after="60"))
    clock = Clock()
    async with start(clock=clock, RECEIVER_POLL_AFTER="0.05") as station:
        began = clock()
        await station.submit("eachlabs")
        await eventually(lambda: station.one("SELECT polls FROM predictions"))
        assert station.one("SELECT due_at FROM predictions") >= began + 60
        assert network.count("eachlabs.poll") == 1


# --- the event stream's bytes ---

ENDS = st.sampled_from([b"\n", b"\r", b"\r\n"])


@given(end=ENDS, cuts=st.lists(st.integers(0, 200)), bom=st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_stream_events_are_the_same_for_any_chunks(end: bytes, cuts: list[int], bom: bytes) -> None:
    lines = [b"event: a", b"data: 1", b"data:\xc3\xa9", b"", b": keep-alive", b"", b"data: 2", b""]
    stream = bom + end.join([*lines, b""])
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    events = Events()
    found = [
        event
        for start, stop in itertools.pairwise(places)
        for event in events.feed(stream[start:stop])
    ]
    assert found == [("a", "1\n\xe9"), ("", "2")]


@pytest.mark.parametrize("chunk", [b"x" * 65536, b"data: " + b"x" * 65530 + b"\n"])
def test_oversized_stream_event_is_unreadable(chunk: bytes) -> None:
    events = Events()
    with pytest.raises(Unreadable, match="1048576 bytes"):
        _ = [list(events.feed(chunk)) for _ in range(20)]


def test_long_stream_line_in_many_chunks_is_parsed_in_linear_time() -> None:
    events, began = Events(), time.process_time()
    data = b"data: " + b"x" * 1_000_000
    for at in range(0, len(data), 50):
        assert list(events.feed(data[at : at + 50])) == []
    assert list(events.feed(b"\n\n")) == [("", "x" * 1_000_000)]
    assert time.process_time() - began < 5.0
