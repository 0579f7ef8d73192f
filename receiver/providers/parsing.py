"""Shared parsers of providers' answers: JSON, errors, refusals, waits, and checks of URLs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import quote

import httpx

from receiver.model.errors import Problem, Unreadable
from receiver.model.states import cause_of
from receiver.model.tolerant import read_json, text_of
from receiver.model.values import Error, Outcome, OutcomeKind, Ticket
from receiver.providers.adapter import Accepted, Ambiguous, Postponed, ProviderResponse, Refused
from receiver.providers.codes import code_of

LONGEST_MESSAGE: Final = 2000
LONGEST_ID: Final = 200
LARGEST_NUMBER: Final = 2**53
"""Above it, no number is a real size, and not every reader of our JSON gets the same number."""

decode: Final = read_json


def decode_object(body: bytes | str) -> dict[str, Any]:
    """Decode a JSON object, or raise Unreadable."""
    value = decode(body)
    if not isinstance(value, dict):
        raise Unreadable("not a JSON object")
    return value


def content(answer: ProviderResponse) -> dict[str, Any]:
    """Return the object of a 2xx, or raise Unreadable; of any other answer, what is readable."""
    return decode_object(answer.body) if is_success(answer) else error_body(answer.body)


def error_body(body: bytes) -> dict[str, Any]:
    """Return the body of a refusal: an object as it is, anything else as its `error`."""
    try:
        value = decode(body)
    except Unreadable:
        text = text_of(body[: 4 * LONGEST_MESSAGE])
        value = "" if text.lstrip().startswith("<") else text
    return value if isinstance(value, dict) else {"error": value}


def is_success(answer: ProviderResponse) -> bool:
    return 200 <= answer.status < 300  # noqa: PLR2004 - any 2xx is success


def unexpected(answer: ProviderResponse, why: str = "") -> Unreadable:
    """Return the error for an answer that does not fit our request, with its message."""
    text = why or error_text(error_body(answer.body))
    return Unreadable(f"HTTP {answer.status}{': ' if text else ''}{text}", retry_after(answer))


_UNFIT: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def first_text(*candidates: Any) -> str:
    """Return the first text that is not blank, cleaned and of bounded length; else ''."""
    for candidate in candidates:
        if isinstance(candidate, str) and candidate.strip():
            return _UNFIT.sub(" ", candidate).strip()[:LONGEST_MESSAGE]
    return ""


_WORDY: Final = ("title", "detail", "message", "msg", "error_message", "error", "type", "code")


def error_text(value: Any, *, depth: int = 3) -> str:
    """Return the message of an error, in any form; '' if there is none."""
    if isinstance(value, dict) and depth:
        return join(dict.fromkeys(error_text(value.get(name), depth=depth - 1) for name in _WORDY))
    if isinstance(value, list) and depth:
        return join(dict.fromkeys(error_text(item, depth=depth - 1) for item in value[:20]))
    if type(value) in (int, float) and value:
        return str(value)[:LONGEST_ID]
    text = first_text(value)
    return "" if text.lower() in _NO_ERROR else text


_NO_ERROR: Final = frozenset({"null", "none", "nil", "undefined", "false", "0", "n/a"})


def is_error(value: Any) -> bool:
    """Return whether the value of a field `error` means that there is an error."""
    return value is True or bool(error_text(value))


def identifier(*candidates: Any) -> str | None:
    """Return the first candidate that can be a provider's id, as text."""
    for given in candidates:
        candidate = str(given) if type(given) is int and abs(given) < LARGEST_NUMBER else given
        if isinstance(candidate, str) and _is_path_segment(candidate):
            return candidate
    return None


def _is_path_segment(text: str) -> bool:
    """Return whether `text` can be one segment of a path, as every provider's id is used as one."""
    fits = 0 < len(text) <= LONGEST_ID and text.isprintable()
    return fits and not {" ", "/"} & set(text) and text not in {".", ".."}


def failure(message: str, *hints: str) -> Error:
    """Return the error of a failed prediction; `hints` (types, codes) only help find its code."""
    text = message[:LONGEST_MESSAGE]
    return Error(code=code_of(text, [join(hints)]), message=text or "unknown")


def refusal(message: str, *hints: str) -> Refused:
    """Return the receipt of a refused submit; the parameters are those of `failure`."""
    refused_content = failure(message, *hints).code == "content_policy"
    return Refused(message, "content_policy" if refused_content else "rejected")


def settle_submit(
    answer: ProviderResponse, message: str, *hints: str, blocks: bool
) -> Refused | Postponed | Ambiguous | Outcome | None:
    """Classify a submit's answer by status alone; None: a 2xx, which the adapter reads.

    `hints` only determine the code of a refusal or failure. A call that `blocks` until the end and
    answers with a server error has failed: its work may be billed, and again if it were repeated.
    """
    reason = message or f"HTTP {answer.status} without a reason"
    if answer.status in _NO_ANSWER:
        return Ambiguous(reason)
    if blocks and answer.status >= httpx.codes.INTERNAL_SERVER_ERROR:
        return Outcome(kind="failed", error=failure(reason, *hints))
    return declined(answer, message, *hints)


_NO_ANSWER: Final = frozenset({504, 524})
"""Timeouts of a gateway: the provider may have accepted the request."""


def declined(answer: ProviderResponse, message: str, *hints: str) -> Refused | Postponed | None:
    """Classify an answer that certainly comes from the provider itself; None: a 2xx."""
    if is_success(answer):
        return None
    reason = message or f"HTTP {answer.status} without a reason"
    if answer.status >= 500 or answer.status in _TRY_AGAIN:  # noqa: PLR2004 - the server errors
        return Postponed(
            reason,
            retry_after(answer),
            whole_provider=answer.status == httpx.codes.TOO_MANY_REQUESTS,
        )
    return refusal(reason, *hints)


def accepted(
    by: str, provider_id: str | None, links: dict[str, str] | None = None, cost: int | None = None
) -> Accepted | Ambiguous:
    """Return the receipt of a submit's 2xx: Ambiguous if it has no id."""
    if provider_id is None:
        return Ambiguous(f"{by} accepted the submit without an id")
    return Accepted(provider_id, links or {}, cost)


def settle_poll(
    ticket: Ticket, answer: ProviderResponse, describe: Callable[[dict[str, Any]], str] = error_text
) -> Outcome | None:
    """Classify a poll's answer by status alone; None: a 200, which the adapter reads.

    `describe` finds the message of an error. Raise Unreadable unless it is a 200 or a 404.
    """
    if answer.status == httpx.codes.NOT_FOUND:
        return Outcome(kind="missing", provider_id=ticket.provider_id)
    if answer.status != httpx.codes.OK:
        raise unexpected(answer, describe(error_body(answer.body)))
    return None


def with_status(body: bytes) -> dict[str, Any]:
    """Return an object that has a status, or raise Unreadable."""
    payload = decode_object(body)
    if not isinstance(payload.get("status"), str):
        raise Unreadable("no status")
    return payload


def only_an_end(outcome: Outcome, *, doubt: bool = False) -> Outcome:
    """Return the outcome of a callback if it is an end and there is no `doubt`; else `ask`."""
    if doubt or cause_of(outcome) is None:
        return Outcome(kind="ask", provider_id=outcome.provider_id)
    return outcome


def outcome_without_output(
    kind: OutcomeKind, provider_id: str | None, failure: Error, canceled: str = "", **more: Any
) -> Outcome:
    """Return an outcome without output: failed, canceled, missing or still processing."""
    ends = {"failed": failure, "canceled": Error(code="canceled", message=canceled)}
    return Outcome(kind=kind, provider_id=provider_id, error=ends.get(kind), **more)


def time_of(text: Any) -> float | None:
    """Return an ISO 8601 time of a provider as unix seconds; None if it is malformed."""
    try:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def key_accepted(answer: ProviderResponse, *, sign: bool) -> bool | None:
    """Return whether a `try_key` was accepted; `sign`: only a valid key gets this answer."""
    if answer.status in {401, 403}:
        return False
    return True if sign else None


_TRY_AGAIN: Final = {408, 425, 429}
_LONGEST_WAIT: Final = 365 * 86400.0
"""Seconds: longer than any deadline, but still a valid time."""


def retry_after(answer: ProviderResponse) -> float | None:
    """Return the seconds to wait, from the header, a field or the message; None if not given."""
    seconds = seconds_of(answer.headers.get("retry-after", ""), answer.at)
    if seconds is None and not is_success(answer):
        body = error_body(answer.body)
        seconds = seconds_of(_number(body.get("retry_after")), answer.at)
        if seconds is None and (wait := _WAIT.search(error_text(body))):
            seconds = float(wait[1])
    return None if seconds is None else min(seconds, _LONGEST_WAIT)


_WAIT: Final = re.compile(r"(?a)\b(?:in|after) ~?(\d{1,7}(?:\.\d{1,3})?) ?s(?:ec(?:ond)?s?)?\b")


def _number(value: Any) -> str:
    """Return a number as text; a text is returned as it is."""
    if isinstance(value, str):
        return value[:LONGEST_MESSAGE]
    return str(value) if type(value) in (int, float) and abs(value) < LARGEST_NUMBER else ""


def quantity(value: Any) -> float | None:
    """Return a number of at least 0, also from its text; None if it is not one."""
    try:
        number = float(value) if type(value) in (int, float, str) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if 0 <= number < LARGEST_NUMBER else None  # refuses nan, too


_SECONDS: Final = re.compile(r"\s*[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?\s*", re.ASCII)


def seconds_of(text: str, now: float) -> float | None:
    """Return the seconds from now of a Retry-After, seconds or a date; None if it is neither."""
    if _SECONDS.fullmatch(text):
        seconds = float(text)
    else:
        try:
            moment = parsedate_to_datetime(text)
            # HTTP's dates are all UTC, also in its oldest form, which has no zone.
            seconds = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() - now
        except (TypeError, ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def model_path(model: str) -> str:
    """Quote a model name for a URL path; raise Problem for an empty, `.` or `..` segment."""
    segments = model.split("/")
    if any(segment in {"", ".", ".."} for segment in segments):
        raise Problem(422, "invalid-model", "model must be a path like owner/name")
    return "/".join(quote(segment, safe="@:+~") for segment in segments)


def segment(ticket: Ticket) -> str:
    """Return the provider's id of a prediction as a segment of a path."""
    return model_path(ticket.provider_id or "")


def may_receive_key(url: Any, bases: Iterable[str], domain: str = "") -> bool:
    """Return whether our key may be sent to a URL from an answer.

    It may at the origin of one of `bases`, and at `domain` and below by HTTPS at its default port.
    """
    if not isinstance(url, str):
        return False
    try:
        given = _origin(url)
        if given in map(_origin, bases):
            return True
        host = httpx.URL(url).raw_host.decode("ascii")
    except (httpx.InvalidURL, UnicodeError):
        return False
    below = bool(domain) and (host == domain or host.endswith(f".{domain}"))
    return below and given == ("https", b"", host.encode())


def _origin(url: str) -> tuple[str, bytes, bytes]:
    """Return the origin that the sending parser sees: two parsers may see two hosts in one URL."""
    parts = httpx.URL(url)
    return parts.scheme, parts.userinfo, parts.netloc


def first(items: Any) -> dict[str, Any]:
    """Return the first item of an untrusted list if it is an object, else an empty one."""
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}


def lookup(table: Mapping[str, Any], key: Any, default: Any) -> Any:
    """Return the value of a table for an untrusted key, which may not even be text."""
    return table.get(key.strip().lower(), default) if isinstance(key, str) else default


def join(parts: Iterable[str]) -> str:
    """Join the sentences that are not empty, cut to the longest message."""
    return "; ".join(part for part in parts if part)[:LONGEST_MESSAGE]
