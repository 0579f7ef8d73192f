"""Parsers of arbitrary input: each returns a bounded value, or raises Unreadable or Unproved."""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.model.errors import Unproved, Unreadable
from receiver.model.values import Error, Outcome, Ticket
from receiver.providers import DECLARED, NAMES
from receiver.providers.adapter import (
    Accepted,
    Ambiguous,
    Callback,
    Follow,
    Postponed,
    ProviderResponse,
    Refused,
    Searched,
    Stopping,
    Streamed,
)
from receiver.providers.signatures import read_jwks
from tests.providers.samples import load, providers
from tests.providers.strategies import answers, bodies, texts, tickets

PROVIDERS = providers()
STREAMS = {name: p for name, p in PROVIDERS.items() if isinstance(p, Streamed)}
PROOF_HEADERS = sorted(
    {
        header
        for (_, case), sample in load().items()
        if case == "proved"
        for header, _ in sample.called().headers
    }
)
DOMAINS = (".bfl.ai",)
"""Domains of a provider's shards, which receive our key too."""
HOSTS = {urlsplit(url).hostname for each in DECLARED.values() for url in each.urls.values()}

of_all = pytest.mark.parametrize("name", NAMES)
SEARCHES = {name: p for name, p in PROVIDERS.items() if isinstance(p, Searched)}
of_streams = pytest.mark.parametrize("name", STREAMS)
of_searches = pytest.mark.parametrize("name", SEARCHES)


def judge(outcome: Outcome) -> None:
    """Check what all later parts rely on."""
    assert len(outcome.output) <= 1000
    assert all(output.url or output.text or output.url == "" for output in outcome.output)
    assert (outcome.error is None) == (outcome.kind not in {"failed", "canceled"})
    assert outcome.kind == "succeeded" or outcome.output == []
    for provider_id in (outcome.provider_id, outcome.also_known_as):
        assert provider_id is None or 0 < len(provider_id) <= 200
    if outcome.error is not None:
        assert 0 < len(outcome.error.message) <= 2000
        assert msgspec.convert(msgspec.to_builtins(outcome.error), Error) == outcome.error
        assert (outcome.error.code == "canceled") == (outcome.kind == "canceled")
    stored = msgspec.json.decode(msgspec.json.encode(outcome), type=Outcome)
    assert stored == outcome


@of_all
@given(body=bodies, confirm=st.booleans())
def test_callback_body_gives_a_bounded_outcome_or_unreadable(
    name: str, body: bytes, *, confirm: bool
) -> None:
    with suppress(Unreadable):
        judge(providers(confirm=confirm)[name].read(body))


@of_all
@given(ticket=tickets, answer=answers, second=answers)
def test_poll_answer_gives_a_bounded_outcome_or_unreadable(
    name: str, ticket: Ticket, answer: ProviderResponse, second: ProviderResponse
) -> None:
    with suppress(Unreadable):
        outcome = PROVIDERS[name].polled(ticket, answer)
        if isinstance(outcome, Follow):
            assert outcome.request.url.host in HOSTS
            outcome = outcome.read(ticket, second)
        judge(outcome)


@of_all
@given(ticket=tickets, answer=answers)
def test_submit_answer_gives_a_bounded_receipt_or_unreadable(
    name: str, ticket: Ticket, answer: ProviderResponse
) -> None:
    with suppress(Unreadable):
        match PROVIDERS[name].accepted(ticket, answer):
            case Outcome() as outcome:
                assert ticket.mode == "sync"
                judge(outcome)
            case Refused(message) | Ambiguous(message):
                assert 0 < len(message) <= 2000
            case Postponed(message, after):
                assert 0 < len(message) <= 2000
                assert after is None or 0 <= after <= 365 * 86400
            case Accepted() as taken:
                assert 200 <= answer.status < 300
                can_be_asked_for(name, ticket, taken)


def can_be_asked_for(name: str, ticket: Ticket, taken: Accepted) -> None:
    """Check that our key is sent only to known hosts, for any id and links of an answer."""
    later = msgspec.structs.replace(ticket, provider_id=taken.provider_id, links=taken.links)
    provider = PROVIDERS[name]
    stops = [provider.cancel(later)] if isinstance(provider, Stopping) else []
    for request in (provider.poll(later), *stops):
        assert request.url.scheme == "https"
        assert not request.url.userinfo
        for host in (request.url.host, urlsplit(str(request.url)).hostname or ""):
            assert host in HOSTS or host.endswith(DOMAINS)
        if not taken.links:
            asked = request.url.params.get("id")
            assert asked == taken.provider_id or len(request.url.path.split("/")) >= 4


@of_all
@given(
    names=st.lists(
        st.sampled_from(PROOF_HEADERS),
        max_size=8,
    ),
    values=st.lists(
        st.binary(max_size=20)
        | st.sampled_from([b"1767225600", b"0" * 128, b"\xff" * 128, b"9" * 12]),
        min_size=8,
        max_size=8,
    ),
    body=bodies,
    keys=st.lists(st.just(bytes(32)) | st.just(b"k" * 32), max_size=3),
)
def test_forged_callback_is_never_proved(
    name: str, names: list[bytes], values: list[bytes], body: bytes, keys: list[bytes]
) -> None:
    callback = Callback(list(zip(names, values, strict=False)), body, 1767225600.0)
    with pytest.raises(Unproved) as refusal:
        PROVIDERS[name].authenticate(callback, now=1767225600.0, keys=keys)
    assert refusal.value.reason.replace("_", "").isalpha()


@of_streams
@given(event=st.just("media_generation_completed") | texts, data=bodies | texts)
def test_stream_event_gives_a_bounded_outcome_none_or_unreadable(
    name: str, event: str, data: bytes | str
) -> None:
    text = data if isinstance(data, str) else data.decode("utf-8", "surrogateescape")
    with suppress(Unreadable):
        outcome = STREAMS[name].streamed(event, text)
        if outcome is not None:
            assert outcome.provider_id
            judge(outcome)


@of_searches
@given(ticket=tickets, answer=answers)
def test_search_answer_gives_only_valid_provider_ids(
    name: str, ticket: Ticket, answer: ProviderResponse
) -> None:
    with suppress(Unreadable):
        found = SEARCHES[name].found(ticket, answer)
        for candidate in found.candidates:
            assert 0 < len(candidate.provider_id) <= 200
        if found.more is not None:
            assert found.more.url.host in HOSTS


@of_streams
@given(
    ticket=tickets,
    rows=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "generation_id": texts,
                "model_name": st.sampled_from(["nano-banana", None, 7]),
                "prompt": texts,
                "enqueued_at": st.integers() | st.floats() | st.just(10**400) | st.none(),
            },
        ),
        max_size=6,
    ),
)
def test_search_in_any_rows_finds_only_their_ids(
    name: str, ticket: Ticket, rows: list[Any]
) -> None:
    answer = ProviderResponse(200, {}, msgspec.json.encode({"generations": rows}))
    found = SEARCHES[name].found(ticket, answer)
    ids = {candidate.provider_id for candidate in found.candidates}
    assert ids <= {row.get("generation_id") for row in rows}


@given(body=bodies)
def test_key_set_gives_32_byte_keys_or_unreadable(body: bytes) -> None:
    with suppress(Unreadable):
        assert all(len(key) == 32 for key in read_jwks(body))
