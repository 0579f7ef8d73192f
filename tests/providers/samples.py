"""Recorded samples: requests and answers of providers, and the results expected of an adapter.

`tests/samples/<provider>/<case>.json` has one case. `act` names the method under test,
`expect` is its result as plain JSON; `says` gives the source of the shape, or why it matters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import httpx
import msgspec

from receiver.model.errors import Problem, ReceiverError
from receiver.model.values import Mode, Outcome, Ticket
from receiver.providers import NAMES
from receiver.providers.adapter import (
    Accepted,
    Addressing,
    Ambiguous,
    Callback,
    CallbackTarget,
    Follow,
    Postponed,
    Provider,
    ProviderResponse,
    Refused,
    Searched,
)
from receiver.providers.signatures import read_jwks
from receiver.settings import Secret, Settings

FOLDER: Final = Path(__file__).parent.parent / "samples"
MODES: Final[tuple[Mode, ...]] = ("queue", "sync")
_TOLD_HEADERS: Final = (
    *("authorization", "x-api-key", "x-key", "api-key"),
    *("accept", "content-type", "prefer"),
)
"""The headers of a request that we choose."""


class SampleTicket(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    model: str = "owner/model"
    mode: Mode = "queue"
    input: dict[str, Any] = {}
    provider_id: str | None = None
    links: dict[str, str] = {}
    submitted_at: float | None = None

    def ticket(self) -> Ticket:
        return Ticket(id="pred_1", **msgspec.structs.asdict(self))


class SampleAnswer(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    status: int
    headers: dict[str, str] = {}
    text: str = ""
    json: Any = msgspec.UNSET
    at: float = 0.0

    def answer(self) -> ProviderResponse:
        text = self.text if self.json is msgspec.UNSET else json.dumps(self.json)
        return ProviderResponse(self.status, httpx.Headers(self.headers), text.encode(), self.at)


class SampleCallback(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    headers: list[tuple[str, str]]
    body: str
    at: float

    def callback(self) -> Callback:
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self.headers]
        return Callback(headers, self.body.encode(), self.at)


class Sample(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    says: str
    act: str
    expect: Any
    ticket: SampleTicket = SampleTicket()
    hook: CallbackTarget | None = None
    answer: SampleAnswer | None = None
    answers: list[SampleAnswer] = []
    """The answer to a poll and, if it leads to a second request, the answer to that."""
    callback: SampleCallback | None = None
    keys: list[str] = []
    jwks: str | None = None
    event: str = ""
    data: str = ""
    confirm: bool = False

    def proof_keys(self) -> list[bytes]:
        if self.jwks is None:
            return [key.encode() for key in self.keys]
        return read_jwks(self.jwks.encode())

    def called(self) -> Callback:
        assert self.callback is not None, "this sample has no callback"
        return self.callback.callback()

    def answered(self) -> ProviderResponse:
        assert self.answer is not None, "this sample has no answer"
        return self.answer.answer()


def load() -> dict[tuple[str, str], Sample]:
    """Read all samples, by provider and case."""
    return {
        (path.parent.name, path.stem): msgspec.json.decode(path.read_bytes(), type=Sample)
        for path in sorted(FOLDER.glob("*/*.json"))
    }


def providers(*, confirm: bool = False) -> dict[str, Provider]:
    """Create every adapter by the default settings, with a test key each."""
    settings = Settings.read({"RECEIVER_DEV": "1"})
    given = {
        name: replace(
            settings.providers[name],
            key=Secret(f"{name}-key"),
            admin_key=Secret(f"{name}-admin-key"),
            confirm=confirm,
        )
        for name in NAMES
    }
    return replace(settings, providers=given).adapters()


def blocks(provider: Provider, model: str) -> Literal["here", "elsewhere"] | None:
    """Return where a blocking submit is sent: to the URL of others, or elsewhere; None: nowhere."""
    if isinstance(provider, Addressing):
        return "elsewhere"
    queue, sync = (
        provider.request(Ticket(id="pred_1", model=model, mode=mode, input={}), None)
        for mode in MODES
    )
    if queue.url.path != sync.url.path:
        return "elsewhere"
    same = (queue.headers, queue.read()) == (sync.headers, sync.read())
    return None if same else "here"


def perform(provider: Provider, sample: Sample) -> Any:
    """Call the method under test, and return its result as plain JSON."""
    return _attempt(lambda: _ACTS[sample.act](provider, sample))


def _attempt(act: Callable[[], Any]) -> Any:
    try:
        return _said(act())
    except ReceiverError as error:
        reason = error.type if isinstance(error, Problem) else str(error)
        return {"raises": type(error).__name__, "reason": reason.partition(":")[0]}


def _polled(provider: Provider, sample: Sample) -> Any:
    ticket = sample.ticket.ticket()
    first, *more = (answer.answer() for answer in sample.answers)
    outcome = provider.polled(ticket, first)
    if not isinstance(outcome, Follow):
        return outcome
    [second] = more
    then = _attempt(lambda: outcome.read(ticket, second))
    return {"follow": _said(outcome.request), "then": then}


def _authenticate(provider: Provider, sample: Sample) -> Any:
    callback = sample.called()
    proved = provider.authenticate(callback, now=callback.at, keys=sample.proof_keys())
    return {"proved": proved}


def _addressed(provider: Addressing, sample: Sample) -> Any:
    found = provider.addressed(sample.ticket.ticket(), sample.answered())
    return {"links": found.links} if isinstance(found, Ticket) else found


def _found(provider: Searched, sample: Sample) -> Any:
    """Return the ids of a page's candidates, each with its callback URL if it has one."""
    found = provider.found(sample.ticket.ticket(), sample.answered())
    ids = [
        [c.provider_id, c.callback_url] if c.callback_url else c.provider_id
        for c in found.candidates
    ]
    return {"ids": ids} | ({"more": _said(found.more)} if found.more else {})


_VERDICTS: Final = {True: "let in", False: "kept out", None: "untold"}

_ACTS: Final[dict[str, Callable[[Any, Sample], Any]]] = {
    "check": lambda p, s: p.check(s.ticket.model, s.ticket.input),
    "request": lambda p, s: p.request(s.ticket.ticket(), s.hook),
    "addressed": _addressed,
    "accepted": lambda p, s: p.accepted(s.ticket.ticket(), s.answered()),
    "authenticate": _authenticate,
    "read": lambda p, s: p.read(s.called().body),
    "poll": lambda p, s: p.poll(s.ticket.ticket()),
    "polled": _polled,
    "bill": lambda p, s: p.bill([s.ticket.ticket()]),
    "billed": lambda p, s: {"costs": p.billed([s.ticket.ticket()], s.answered())},
    "price": lambda p, s: p.price(s.ticket.model),
    "priced": lambda p, s: {"priced": p.priced(s.ticket.model, s.answered())},
    "meter": lambda p, s: p.meter(s.ticket.ticket()),
    "metered": lambda p, s: {"units": p.metered(s.answered())},
    "cancel": lambda p, s: p.cancel(s.ticket.ticket()),
    "details": lambda p, s: p.details(s.ticket.model),
    "try_key": lambda p, _: p.try_key(),
    "key_works": lambda p, s: {_VERDICTS[p.key_works(s.answered())]: s.answered().status},
    "stream": lambda p, _: p.stream(),
    "streamed": lambda p, s: p.streamed(s.event, s.data),
    "search": lambda p, s: {"requests": [_said(r) for r in p.search(s.ticket.ticket())]},
    "found": _found,
    "keys": lambda p, _: p.keys(),
    "read_keys": lambda p, s: {"keys": len(p.read_keys(s.answered().body))},
}


def _said(value: Any) -> Any:
    match value:
        case httpx.Request():
            return _request(value)
        case Outcome():
            return _trim(
                {
                    "outcome": value.kind,
                    "provider_id": value.provider_id,
                    "also_known_as": value.also_known_as,
                    "output": msgspec.to_builtins(value.output),
                    "error": msgspec.to_builtins(value.error),
                    "cost": value.cost,
                    "units": value.units,
                }
            )
        case Accepted(provider_id, links, cost):
            return _trim({"accepted": provider_id, "links": links, "cost": cost})
        case Refused() | Ambiguous():
            said = msgspec.structs.asdict(value)
            said[type(value).__name__.lower()] = said.pop("message")
            return {name: each for name, each in said.items() if each != "rejected"}
        case Postponed(message, after, whole_provider, holds):
            said = {"postponed": message, "after": after, "holds": holds}
            return _trim({**said, "whole_provider": whole_provider})
    return value


def _request(request: httpx.Request) -> dict[str, Any]:
    headers = {name: request.headers[name] for name in _TOLD_HEADERS if name in request.headers}
    said = {"method": request.method, "url": str(request.url), "headers": headers}
    content = request.read()
    if "multipart" in headers.get("content-type", ""):
        return {**said, "parts": content.decode("latin-1").split("\r\n")}
    return {**said, "body": json.loads(content)} if content else said


def _trim(said: dict[str, Any]) -> dict[str, Any]:
    """Leave out empty values, but keep zeros."""
    return {name: value for name, value in said.items() if value not in (None, [], {}, False)}


def ending(expect: Any) -> str:
    """Return the kind of an expectation, to see which kinds have samples."""
    if expect is None:
        return "nothing"
    if "follow" in expect:
        return ending(expect["then"])
    return str(expect.get("outcome") or ("request" if "method" in expect else next(iter(expect))))


def swapped(headers: Sequence[tuple[bytes, bytes]], name: bytes, value: bytes) -> list[Any]:
    """Return the headers with another value for one of them."""
    return [(key, value if key == name else old) for key, old in headers]
