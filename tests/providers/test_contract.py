"""The contract of all adapters: recorded samples, the required shapes, and forged callbacks.

A new provider is tested once it is in `receiver.providers`; it needs a sample of every shape.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from itertools import product
from typing import Final

import httpx
import msgspec
import pytest

from receiver.model.errors import Unproved, Unreadable
from receiver.model.values import Outcome, Ticket
from receiver.providers import DECLARED, NAMES
from receiver.providers.adapter import (
    Addressing,
    Ambiguous,
    Billing,
    Callback,
    Describing,
    Metered,
    Provider,
    ProviderResponse,
    Publishing,
    Searched,
    Stopping,
    Streamed,
)
from tests.providers.samples import (
    FOLDER,
    MODES,
    Sample,
    blocks,
    ending,
    load,
    perform,
    providers,
    swapped,
)

SAMPLES: Final = load()
PROVIDERS: Final = providers()
PUSHING: Final = [name for name, provider in PROVIDERS.items() if provider.proof != "none"]

EVERY_PROVIDER: Final = {
    *((act, "request") for act in ("request", "poll")),
    *(("accepted", end) for end in ("accepted", "refused", "postponed", "ambiguous")),
    *(("polled", end) for end in ("processing", "succeeded", "failed", "missing")),
    ("polled", "raises"),
    ("check", "nothing"),
    ("try_key", "request"),
    *(("key_works", end) for end in ("let in", "kept out", "untold")),
}
WITH_CALLBACKS: Final = {
    *(("authenticate", end) for end in ("proved", "raises")),
    *(("read", end) for end in ("succeeded", "failed", "ask", "raises")),
}
WITH_A_STREAM: Final = {
    *(("streamed", end) for end in ("succeeded", "failed", "ask", "nothing", "raises")),
    ("stream", "request"),
}
BY_PROTOCOL: Final[dict[type, set[tuple[str, str]]]] = {
    Streamed: WITH_A_STREAM,
    Addressing: {("addressed", end) for end in ("links", "refused", "postponed", "raises")},
    Stopping: {("cancel", "request"), ("polled", "canceled")},
    Describing: {("details", "request")},
    Billing: {("bill", "request"), ("billed", "costs"), ("billed", "raises")},
    Metered: {
        *(("priced", end) for end in ("priced", "raises")),
        *(("metered", end) for end in ("units", "raises")),
        ("price", "request"),
        ("meter", "request"),
    },
    Searched: {("search", "requests"), ("found", "ids"), ("found", "raises")},
    Publishing: {("keys", "request"), ("read_keys", "keys"), ("read_keys", "raises")},
}
WITHOUT_CALLBACKS: Final = {("authenticate", "raises"), ("read", "raises")}


@pytest.mark.parametrize("name", NAMES)
def test_adapter_gives_the_expected_result_for_each_sample(name: str) -> None:
    for (owner, case), sample in SAMPLES.items():
        if owner == name:
            adapter = providers(confirm=sample.confirm)[name]
            assert perform(adapter, sample) == sample.expect, f"{case}: {sample.says}"


@pytest.mark.parametrize("name", NAMES)
def test_provider_has_a_sample_of_every_required_shape(name: str) -> None:
    provider = PROVIDERS[name]
    wanted = set(EVERY_PROVIDER)
    wanted |= WITH_CALLBACKS if provider.proof != "none" else WITHOUT_CALLBACKS
    if blocks(provider, DECLARED[name].example):
        wanted.add(("accepted", "succeeded"))
    for kind, shapes in BY_PROTOCOL.items():
        if isinstance(provider, kind):
            wanted |= shapes
    have = {(s.act, ending(s.expect)) for (owner, _), s in SAMPLES.items() if owner == name}
    assert not wanted - have


def test_every_folder_of_samples_belongs_to_a_provider() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_adapter_implements_the_provider_protocol(name: str) -> None:
    provider = PROVIDERS[name]
    assert isinstance(provider, Provider)
    assert provider.name == name
    assert isinstance(provider, Streamed) == (provider.proof == "none")


@pytest.mark.parametrize(("name", "case"), [key for key, s in SAMPLES.items() if s.hook])
def test_submit_has_a_callback_url_only_if_the_provider_documents_callbacks(
    name: str, case: str
) -> None:
    sample = SAMPLES[name, case]
    request = PROVIDERS[name].request(sample.ticket.ticket(), sample.hook)
    has_url = "hooks.example.org" in str(request.url) or b"hooks.example.org" in request.read()
    assert has_url == (PROVIDERS[name].proof != "none" and sample.ticket.mode == "queue")


# --- Forged callbacks ----------------------------------------------------------------------------


def genuine(name: str) -> Sample:
    return SAMPLES[name, "proved"]


def prove(name: str, callback: Callback) -> str | None:
    sample = genuine(name)
    assert sample.callback is not None
    return PROVIDERS[name].authenticate(callback, now=sample.callback.at, keys=sample.proof_keys())


def with_headers(name: str, headers: list[tuple[bytes, bytes]]) -> Callback:
    return msgspec.structs.replace(genuine(name).called(), headers=headers)


PROOF_HEADERS: Final = [
    (name, header)
    for name in PUSHING
    for header, _ in genuine(name).called().headers
    if header != b"content-type"
]

CHANGED_VALUES: Final[dict[str, Callable[[bytes], bytes]]] = {
    "empty": lambda _: b"",
    "first byte": lambda v: bytes([v[0] ^ 1]) + v[1:],
    "last byte": lambda v: v[:-1] + bytes([v[-1] ^ 1]),
    "cut short": lambda v: v[:-1],
    "cut in half": lambda v: v[: len(v) // 2],
    "too long": lambda v: v + v[-1:],
    "twice in one": lambda v: v + b", " + v,
    "blank before": lambda v: b" " + v,
    "blank after": lambda v: v + b" ",
    "line end after": lambda v: v + b"\n",
    "NUL after": lambda v: v + b"\x00",
    "in quotes": lambda v: b'"' + v + b'"',
    "not ASCII": lambda v: b"\xff" * len(v),
    "not ASCII, as UTF-8": lambda v: "é".encode() * (len(v) // 2),
    "other digits": lambda v: "".join(chr(0x660 + b % 10) for b in v).encode(),
    "huge": lambda v: v * 20_000,
}


@pytest.mark.parametrize("name", PUSHING)
def test_genuine_callback_is_proved(name: str) -> None:
    prove(name, genuine(name).called())


@pytest.mark.parametrize(("name", "header"), PROOF_HEADERS)
def test_changed_or_malformed_proof_header_is_rejected(name: str, header: bytes) -> None:
    headers = genuine(name).called().headers
    for how, change in CHANGED_VALUES.items():
        value = change(dict(headers)[header])
        with pytest.raises(Unproved) as refusal:
            prove(name, with_headers(name, swapped(headers, header, value)))
        assert re.fullmatch(r"bad_[a-z]+|stale_timestamp", refusal.value.reason), how


@pytest.mark.parametrize(("name", "header"), PROOF_HEADERS)
def test_missing_proof_header_is_rejected(name: str, header: bytes) -> None:
    headers = [(key, value) for key, value in genuine(name).called().headers if key != header]
    with pytest.raises(Unproved, match=r"^missing_header$"):
        prove(name, with_headers(name, headers))


@pytest.mark.parametrize(("name", "header"), PROOF_HEADERS)
def test_repeated_proof_header_is_rejected(name: str, header: bytes) -> None:
    headers = list(genuine(name).called().headers)
    for value in (dict(headers)[header], b"x"):
        for twice in ([(header, value), *headers], [*headers, (header, value)]):
            with pytest.raises(Unproved, match=r"^repeated_header$"):
                prove(name, with_headers(name, twice))


@pytest.mark.parametrize("name", PUSHING)
def test_callback_without_headers_is_rejected(name: str) -> None:
    with pytest.raises(Unproved, match=r"^missing_header$"):
        prove(name, with_headers(name, []))


@pytest.mark.parametrize("name", NAMES)
def test_callback_is_never_proved_without_a_key(name: str) -> None:
    callback = genuine(name).called() if name in PUSHING else Callback([], b"{}", 0.0)
    with pytest.raises(Unproved):
        PROVIDERS[name].authenticate(callback, now=callback.at, keys=[])


@pytest.mark.parametrize("name", PUSHING)
def test_additional_header_does_not_change_the_proof(name: str) -> None:
    headers = [*genuine(name).called().headers, (b"x-other", b"\xff")]
    assert prove(name, with_headers(name, headers)) == prove(name, genuine(name).called())


HOSTILE: Final[dict[str, bytes]] = {
    "empty": b"",
    "blank": b" \n",
    "half an object": b'{"status": "OK"',
    "HTML": b"<html></html>",
    "a list": b"[]",
    "null": b"null",
    "a number": b"7",
    "text": b'"succeeded"',
    "bytes": b"\xff\xfe\x00",
    "two objects": b'{"status": "OK"}{"status": "OK"}',
    "deep lists": b"[" * 200_000 + b"]" * 200_000,
    "deep lists without end": b"[" * 200_000,
    "many lists": b"[" + b"[]," * 600_000 + b"1]",
}

UNUSUAL: Final[dict[str, bytes]] = {
    "half a character": b'{"status": "\xc3"}',
    "half a surrogate": b'{"status": "\\ud800"}',
    "a byte order mark": b'\xef\xbb\xbf{"status": "OK"}',
    "UTF-16": '{"status": "OK"}'.encode("utf-16"),
    "UTF-32": '{"status": "OK"}'.encode("utf-32"),
    "nan": b'{"status": "OK", "payload": NaN}',
    "too large a number": b'{"status": "OK", "payload": 1e999}',
    "too long a number": b'{"status": "OK", "payload": ' + b"9" * 5000 + b"}",
    "a NUL behind": b'{"status": "OK"}\0\n',
    "depth": b'{"status": "OK", "a": %b1%b}' % (b'{"b":' * 2000, b"}" * 2000),
    "a line end in a text": b'{"status": "O\nK"}',
}


@pytest.mark.parametrize("name", PUSHING)
def test_callback_of_unusual_json_is_read_and_leads_to_a_poll(name: str) -> None:
    assert {PROVIDERS[name].read(body).kind for body in UNUSUAL.values()} == {"ask"}


@pytest.mark.parametrize("confirm", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_callback_body_that_is_not_a_json_object_is_unreadable(name: str, *, confirm: bool) -> None:
    provider = providers(confirm=confirm)[name]
    for body in HOSTILE.values():
        with pytest.raises(Unreadable):
            provider.read(body)


@pytest.mark.parametrize(
    "place", ['{{"payload": {0}, {1}}}', '{{"payload": {{"detail": [{{"loc": {0}}}]}}, {1}}}']
)
@pytest.mark.parametrize("name", PUSHING)
def test_deeply_nested_body_gives_an_outcome_or_unreadable(name: str, place: str) -> None:
    for depth, status in product((20, 400, 800, 900, 960), ("OK", "ERROR", "succeeded", "failed")):
        nested = "[" * depth + '"https://deep.example/"' + "]" * depth
        body = place.format(nested, f'"status": "{status}", "output": {nested}')
        with suppress(Unreadable):
            outcome = PROVIDERS[name].read(body.encode())
            assert isinstance(outcome, Outcome), (depth, status)
            assert outcome.output == [], (depth, status)


@pytest.mark.parametrize("status", [504, 524])
@pytest.mark.parametrize("name", NAMES)
def test_gateway_timeout_504_or_524_is_an_ambiguous_submit(name: str, status: int) -> None:
    for mode, body in product(MODES, (b"", b"<html>", b'{"error": "timeout"}')):
        ticket = Ticket(id="pred_1", model="owner/model", mode=mode, input={})
        answer = ProviderResponse(status, httpx.Headers({"retry-after": "1"}), body)
        assert isinstance(PROVIDERS[name].accepted(ticket, answer), Ambiguous), (mode, body)


@pytest.mark.parametrize("name", NAMES)
def test_hostile_answer_gives_a_result_or_unreadable(name: str) -> None:
    statuses = (200, 202, 400, 401, 404, 422, 429, 500, 503)
    for (what, body), status, mode in product((HOSTILE | UNUSUAL).items(), statuses, MODES):
        answer = ProviderResponse(status, httpx.Headers(), body)
        ticket = Ticket(id="pred_1", model="owner/model", mode=mode, input={}, provider_id="1")
        for act in (PROVIDERS[name].accepted, PROVIDERS[name].polled):
            with suppress(Unreadable):
                assert act(ticket, answer) is not None, (what, status, mode)
