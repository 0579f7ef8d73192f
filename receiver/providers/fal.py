"""fal.ai: a queue with callbacks signed by Ed25519; a result may have to be fetched separately.

Facts: docs.fal.ai (queue, webhooks, errors), fal-ai/fal `fal_client` (2026-08), and the OpenAPI of
api.fal.ai (2026-08), which describes models and lists requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_network
from typing import Any, ClassVar, Final

import httpx

from receiver.model.costs import DEAREST, micro
from receiver.model.errors import Unreadable
from receiver.model.ids import made_at
from receiver.model.values import Error, Outcome, Ticket
from receiver.providers import parsing, results
from receiver.providers.adapter import (
    Ambiguous,
    Callback,
    CallbackTarget,
    Candidate,
    Follow,
    Found,
    Network,
    Postponed,
    Proof,
    ProviderResponse,
    Receipt,
    Refused,
)
from receiver.providers.declared import Declared
from receiver.providers.signatures import read_jwks, verify_ed25519

_DAY: Final = 86400.0
_BILLED_FOR: Final = 80 * _DAY
"""Seconds before the newest request; fal looks through 90 days at most, or refuses all."""

_STATUS_CODES: Final = frozenset({httpx.codes.OK, httpx.codes.ACCEPTED})
_LINKS: Final = ("status_url", "response_url", "cancel_url")
_NO_REQUEST: Final = "fal-ai/nano-banana/requests/00000000-0000-0000-0000-000000000000"
_NAMESPACES: Final = frozenset({"workflows", "comfy"})
_LOCKED: Final = "user is locked"
"""Text of a 403 about the account: its money is used up, or it was stopped by hand. It may come and
go while the account has money, and a new key does not help (fal-ai/fal issues, 2026)."""
_CLOCK_SKEW: Final = 120.0
"""Seconds by which fal's clock and ours may differ when looking for a lost submit."""
_LISTED: Final = 50
"""Requests on a page, each with its input and its result."""


@dataclass(frozen=True)
class Fal:
    """The adapter; the URLs have no trailing slash."""

    key: str
    queue_url: str
    run_url: str
    jwks_url: str
    api_url: str
    admin_key: str = ""
    """A key with the scope for billing events; empty: they are not requested."""
    name: ClassVar[str] = "fal"
    proof: ClassVar[Proof] = "public_keys"
    most_billed: ClassVar[int] = 50

    def check(self, model: str, input: dict[str, Any]) -> None:  # noqa: ARG002 - the protocol's
        """Refuse only a model that could not be a path."""
        parsing.model_path(model)

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request:
        path = parsing.model_path(ticket.model)
        if ticket.mode == "sync":
            return self._call("POST", f"{self.run_url}/{path}", json=ticket.input)
        params = {"fal_webhook": hook.url} if hook else {}
        return self._call("POST", f"{self.queue_url}/{path}", json=ticket.input, params=params)

    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt:
        if ticket.mode == "sync":
            return _blocking(ticket, answer)
        body = parsing.content(answer)
        if settled := _settled(answer, body):
            return settled
        links = {name: body[name] for name in _LINKS if self._ours(body.get(name))}
        return parsing.accepted("fal.ai", parsing.identifier(body.get("request_id")), links)

    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> str:
        return verify_ed25519(callback, b"x-fal-webhook-", b"request-id", now=now, keys=keys)

    def keys(self) -> httpx.Request:
        return httpx.Request("GET", self.jwks_url)

    def read_keys(self, body: bytes) -> list[bytes]:
        return read_jwks(body)

    def read(self, body: bytes) -> Outcome:
        payload = parsing.decode_object(body)
        request_id = parsing.identifier(payload.get("request_id"))
        gateway_id = parsing.identifier(payload.get("gateway_request_id"))
        ids: dict[str, Any] = {
            "provider_id": request_id or gateway_id,
            "also_known_as": gateway_id,
        }
        content = payload.get("payload")
        match payload.get("status"):
            case "OK" if content is not None:
                return Outcome(kind="succeeded", output=results.outputs(content), **ids)
            case "ERROR":
                return Outcome(**_failed(payload, content), **ids)
        # OK without a payload (it could not be serialised), or an unknown status.
        return Outcome(kind="ask", **ids)

    def poll(self, ticket: Ticket) -> httpx.Request:
        return self._call("GET", self._link(ticket, "status_url"))

    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome | Follow:
        """Read a status (202 while it runs, 200 at the end); at the end, Follow to the result."""
        if answer.status == httpx.codes.NOT_FOUND:
            return Outcome(kind="missing", provider_id=ticket.provider_id)
        if answer.status not in _STATUS_CODES:
            raise parsing.unexpected(answer, _detail(parsing.error_body(answer.body)))
        body = parsing.with_status(answer.body)
        if body["status"].strip().upper() != "COMPLETED":
            return Outcome(kind="processing", provider_id=ticket.provider_id)
        if parsing.is_error(body.get("error")) or parsing.is_error(body.get("error_type")):
            return Outcome(provider_id=ticket.provider_id, **_failed(body, body))
        return Follow(self._call("GET", self._link(ticket, "response_url")), _result)

    def cancel(self, ticket: Ticket) -> httpx.Request:
        return self._call("PUT", self._link(ticket, "cancel_url"))

    @property
    def bills_after(self) -> float | None:
        """Our guess, as fal does not document the delay of its billing events."""
        return 900.0 if self.key and self.admin_key else None

    def bill(self, tickets: Sequence[Ticket]) -> httpx.Request:
        times = [each.submitted_at or made_at(each.id) for each in tickets]
        since = max(min(times) - _DAY, max(times) - _BILLED_FOR)
        start = datetime.fromtimestamp(since, UTC)
        params = {
            "request_id": ",".join(each.provider_id or "" for each in tickets),
            "start": start.strftime("%Y-%m-%dT%H:%M:%SZ"),  # without it: events of the last day
        }
        url = f"{self.api_url}/v1/models/billing-events"
        return self._call("GET", url, key=self.admin_key, params=params)

    def billed(self, tickets: Sequence[Ticket], answer: ProviderResponse) -> dict[str, int]:
        """Add up the billing events of each request; without an event its cost is unknown."""
        if answer.status != httpx.codes.OK:
            raise parsing.unexpected(answer)
        events = parsing.decode_object(answer.body).get("billing_events")
        if not isinstance(events, list):
            raise Unreadable("no list of billing events")
        ids = {each.provider_id: each.id for each in tickets}
        found: dict[str, int] = {}
        for event in events:
            payload = event if isinstance(event, dict) else {}
            name = ids.get(parsing.identifier(payload.get("request_id")))
            if name is not None and (cost := _billed(payload)) is not None:
                found[name] = found.get(name, 0) + cost
        return found

    @property
    def metered_after(self) -> float | None:
        """Results contain the units; any key may read the price of a unit."""
        return 60.0 if self.key else None

    def price(self, model: str) -> httpx.Request:
        url = f"{self.api_url}/v1/models/pricing"
        return self._call("GET", url, params={"endpoint_id": model})

    def priced(self, model: str, answer: ProviderResponse) -> float | None:
        if answer.status == httpx.codes.NOT_FOUND:
            return None
        if answer.status != httpx.codes.OK:
            raise parsing.unexpected(answer)
        prices = parsing.decode_object(answer.body).get("prices")
        if not isinstance(prices, list):
            raise Unreadable("no list of prices")
        found = (each for each in prices if isinstance(each, dict) and _is_of(each, model))
        return parsing.quantity(next(found, {}).get("unit_price"))

    def meter(self, ticket: Ticket) -> httpx.Request:
        return self._call("GET", self._link(ticket, "response_url"))

    def metered(self, answer: ProviderResponse) -> float | None:
        if not (parsing.is_success(answer) or answer.status == httpx.codes.NOT_FOUND):
            raise parsing.unexpected(answer, _detail(parsing.error_body(answer.body)))
        return _units(answer)

    def search(self, ticket: Ticket) -> Sequence[httpx.Request]:
        """List the requests to this model since shortly before our submit.

        Only ended requests are certain to be listed, so a list without ours proves nothing.
        """
        return [self._requests(ticket, {})]

    def found(self, ticket: Ticket, answer: ProviderResponse) -> Found:
        """Return the requests with the same input, sent around our submit."""
        if not parsing.is_success(answer):
            raise parsing.unexpected(answer, _detail(parsing.error_body(answer.body)))
        page = parsing.decode_object(answer.body)
        items = page.get("items")
        if not isinstance(items, list):
            raise Unreadable("no list of requests")
        sent = sorted(filter(None, (_sent(ticket, item) for item in items)))
        cursor = parsing.first_text(page.get("next_cursor"))
        more = self._requests(ticket, {"cursor": cursor}) if cursor else None
        return Found([Candidate(request_id) for _, request_id in sent], more)

    def _requests(self, ticket: Ticket, page: Mapping[str, Any]) -> httpx.Request:
        start = datetime.fromtimestamp((ticket.submitted_at or 0.0) - _CLOCK_SKEW, UTC)
        params = {
            "endpoint_id": ticket.model,
            "start": start.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "expand": "payloads",
            "limit": _LISTED,
            **page,
        }
        url = f"{self.api_url}/v1/models/requests/by-endpoint"
        return self._call("GET", url, params=params)

    def details(self, model: str) -> httpx.Request:
        """Ask for one model, with the OpenAPI of its input and output."""
        params = {"endpoint_id": model, "expand": "openapi-3.0"}
        return self._call("GET", f"{self.api_url}/v1/models", params=params)

    def try_key(self) -> httpx.Request:
        """Ask for the status of a request that does not exist."""
        return self._call("GET", f"{self.queue_url}/{_NO_REQUEST}/status")

    def key_works(self, answer: ProviderResponse) -> bool | None:
        """Take fal's own 404 as a valid key: a bad key gets a 401 before anything is looked up."""
        status = parsing.error_body(answer.body).get("status")
        looked_up = answer.status in {*_STATUS_CODES, httpx.codes.NOT_FOUND}
        return parsing.key_accepted(answer, sign=looked_up and isinstance(status, str))

    def _call(
        self, method: str, url: str, *, key: str | None = None, **content: Any
    ) -> httpx.Request:
        headers = {"Authorization": f"Key {key or self.key}", "Accept": "application/json"}
        return httpx.Request(method, url, headers=headers, **content)

    def _ours(self, url: Any) -> bool:
        """Return whether a URL from an answer is at a configured host, and may receive our key."""
        return parsing.may_receive_key(url, (self.queue_url, self.run_url))

    def _link(self, ticket: Ticket, name: str) -> str:
        """Return the URL that fal returned; if there is none, build it as fal's clients do."""
        if name in ticket.links:
            return ticket.links[name]
        segments = parsing.model_path(ticket.model).split("/")
        app = "/".join(segments[: 3 if segments[0] in _NAMESPACES else 2])
        tail = {"status_url": "/status", "response_url": "", "cancel_url": "/cancel"}[name]
        return f"{self.queue_url}/{app}/requests/{parsing.segment(ticket)}{tail}"


def _billed(event: dict[str, Any]) -> int | None:
    """Return the microdollars of an event, from whole nanodollars or from dollars."""
    nano = event.get("cost_estimate_nano_usd")
    if type(nano) is int and 0 <= nano <= DEAREST * 1000:
        return micro(nano / 1e9)
    return micro(event.get("cost_total"))


def _is_of(price: dict[str, Any], model: str) -> bool:
    return price.get("endpoint_id") == model and price.get("currency") == "USD"


def _units(answer: ProviderResponse) -> float | None:
    return parsing.quantity(answer.headers.get("x-fal-billable-units"))


def read_meta(body: bytes) -> list[Network]:
    """Return the address ranges of callbacks; an invalid range is left out."""
    texts = parsing.decode_object(body).get("webhook_ip_ranges")
    ranges = map(_range, texts if isinstance(texts, list) else [])
    return [found for found in ranges if found is not None]


def _range(text: Any) -> Network | None:
    try:
        return ip_network(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _result(ticket: Ticket, answer: ProviderResponse) -> Outcome:
    """Read the result: the model's output, or its error with the model's own HTTP code."""
    if parsing.is_success(answer):
        return _made(ticket, answer, ticket.provider_id)
    body = parsing.error_body(answer.body)
    if answer.status == httpx.codes.NOT_FOUND and not _items(body):  # a list: the model's own error
        return Outcome(kind="missing", provider_id=ticket.provider_id)
    detail = _detail(body)
    if "still in progress" in detail.lower():
        return Outcome(kind="processing", provider_id=ticket.provider_id)
    refused = detail and answer.status < httpx.codes.INTERNAL_SERVER_ERROR
    final = (
        isinstance(body.get("detail"), list)
        or answer.status == httpx.codes.UNPROCESSABLE_ENTITY
        or (_is_final(answer) and detail)
        or (refused and answer.status >= httpx.codes.BAD_REQUEST)
    )
    if not final or answer.status in _OF_THE_ACCOUNT:
        raise parsing.unexpected(answer, detail)  # an error of the infrastructure, not of the model
    return Outcome(provider_id=ticket.provider_id, **_failed(body, body, answer))


_OF_THE_ACCOUNT: Final = frozenset({401, 402, 403, 408, 409, 425, 429})
"""Statuses of a result that may come later: with the right key, with money, or after a wait."""


def _made(ticket: Ticket, answer: ProviderResponse, provider_id: str | None) -> Outcome:
    value = parsing.decode(answer.body)
    if value is None or isinstance(value, bool):
        raise Unreadable("no result")
    made = results.outputs(value, ticket.input)
    units = _units(answer)
    return Outcome(kind="succeeded", provider_id=provider_id, output=made, units=units)


def _blocking(ticket: Ticket, answer: ProviderResponse) -> Receipt:
    """Read the answer of a blocking run, whose id is only in a header."""
    request_id = parsing.identifier(answer.headers.get("x-fal-request-id"))
    if parsing.is_success(answer):
        return _made(ticket, answer, request_id)
    body = parsing.error_body(answer.body)
    if answer.status >= httpx.codes.INTERNAL_SERVER_ERROR and _is_final(answer):
        return Outcome(provider_id=request_id, **_failed(body, body, answer))
    return _settled(answer, body) or Ambiguous(f"HTTP {answer.status}")


def _settled(
    answer: ProviderResponse, body: dict[str, Any]
) -> Refused | Postponed | Ambiguous | Outcome | None:
    """Classify a submit's answer; a lock concerns the account, not the submit.

    Fal's own 504 means that the request did not begin in time, and fal bills no 5xx; the 504 of a
    gateway before it, without `detail` and `x-fal-` headers, is ambiguous.
    """
    detail = _detail(body)
    if answer.status == httpx.codes.FORBIDDEN and _LOCKED in detail.lower():
        return Postponed(detail, holds="locked")
    is_fals = "detail" in body or any(name.startswith("x-fal-") for name in answer.headers)
    hints = _hints(body, answer)
    if is_fals:
        return parsing.declined(answer, detail, *hints)
    return parsing.settle_submit(answer, detail, *hints, blocks=False)


def _sent(ticket: Ticket, item: Any) -> tuple[float, str] | None:
    """Return when a listed request was sent, and its id, if it can be our submit."""
    if not isinstance(item, dict) or item.get("json_input") != ticket.input:
        return None
    at = parsing.time_of(item.get("sent_at"))
    request_id = parsing.identifier(item.get("request_id"))
    if at is None or request_id is None or ticket.submitted_at is None:
        return None
    return (at, request_id) if abs(at - ticket.submitted_at) <= _CLOCK_SKEW else None


def _is_final(answer: ProviderResponse) -> bool:
    """Return whether fal hints that the same request would fail again (old and new header name)."""
    hints = (answer.headers.get(name, "") for name in ("x-fal-needs-retry", "x-fal-retryable"))
    return any(hint.strip().lower() in {"0", "false"} for hint in hints)


def _failed(
    body: dict[str, Any], content: Any, answer: ProviderResponse | None = None
) -> dict[str, Any]:
    """Return the kind and error of a failed outcome, from every place that may have the message."""
    details = content if isinstance(content, dict) else {}
    hints = [parsing.first_text(body.get("error_type")), *_hints(details, answer)]
    message = parsing.join(dict.fromkeys([parsing.error_text(body.get("error")), _detail(details)]))
    if any("client_cancelled" in text for text in (*hints, message)):
        error = Error(code="canceled", message=message or "canceled at fal.ai")
        return {"kind": "canceled", "error": error}
    return {"kind": "failed", "error": parsing.failure(message, *hints)}


def _hints(body: dict[str, Any], answer: ProviderResponse | None) -> list[str]:
    """Return the types of an error and of each of its details."""
    header = answer.headers.get("x-fal-error-type") if answer else None
    kinds = (item.get("type") for item in _items(body))
    return [parsing.first_text(kind) for kind in (*kinds, body.get("error_type"), header)]


def _items(body: dict[str, Any]) -> list[dict[str, Any]]:
    detail = body.get("detail")
    return [i for i in detail if isinstance(i, dict)] if isinstance(detail, list) else []


def _detail(body: dict[str, Any]) -> str:
    """Return `detail` as one text: it is a text, or a list of located messages."""
    located = [
        ": ".join(filter(None, (_place(item), parsing.first_text(item.get("msg")))))
        for item in _items(body)
    ]
    texts = map(parsing.error_text, (body.get("detail"), body.get("error"), body.get("message")))
    return parsing.first_text("; ".join(located), *texts)


def _place(item: dict[str, Any]) -> str:
    loc = item.get("loc")
    parts = loc if isinstance(loc, list) else []
    return ".".join(str(part) for part in parts if isinstance(part, str | int))


_PARTS: Final = ("queue", "run", "jwks", "api")

DECLARED: Final = Declared(
    make=lambda given: Fal(
        key=given.key,
        admin_key=given.admin_key,
        **{f"{part}_url": given.urls[part] for part in _PARTS},
    ),
    key="FAL_KEY",
    admin_key="FAL_ADMIN_KEY",
    urls={
        "queue": "https://queue.fal.run",
        "run": "https://fal.run",
        "jwks": "https://rest.fal.ai/.well-known/jwks.json",
        "meta": "https://api.fal.ai/v1/meta",
        "api": "https://api.fal.ai",
    },
    example="fal-ai/nano-banana",
    read_sources=read_meta,
)
