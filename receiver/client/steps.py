"""Requests, answers and retries as values (sans-IO): a driver does the I/O.

A call is a generator of steps. A driver does each step, blocking or awaited, and `advance` gives
its result to the generator, or throws in the httpx.RequestError.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any, Final, TypeAlias, TypeVar

import httpx
import msgspec

from receiver.model.errors import ReceiverError

T = TypeVar("T")

PREFIX: Final = "urn:receiver:problem:"
_FIRST_PAUSE: Final = 0.5
_LONGEST_PAUSE: Final = 10.0
_LATER: Final = frozenset({429, 503})
"""Statuses that mean that nothing was done: repeat the request after Retry-After."""
_LOST: Final = frozenset({502, 504})
"""Statuses of a proxy: it is not known whether the receiver handled the request."""
_FOREIGN: Final = frozenset({"no-receiver", "http-error"})
"""Types of errors that are not problems of the receiver's own."""
_OF_HEAD: Final = {401: "unauthorized", 403: "read-only", 429: "rate-limited", 503: "unavailable"}
"""Types of problems for answers to HEAD, which have no body to name them."""
_UNSENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
_LONGEST_QUOTE: Final = 200


class ClientError(ReceiverError):
    """The failure of a call: the receiver refused it or could not be reached.

    `type` is the problem's, as in `not-found`; or `unreachable` (no answer), `no-receiver`
    (another server answered), `unverified` (an event is not from the receiver) or `unfit` (wrong
    arguments; nothing was sent). The message is fit for a terminal.
    """

    def __init__(
        self,
        type: str,
        detail: str,
        *,
        status: int | None = None,
        retry_after: int | None = None,
        prediction_id: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.type = type
        self.detail = detail
        self.status = status
        """The HTTP status; None if there was no answer."""
        self.retry_after = retry_after
        """Seconds to wait before a repeat, if the answer specifies them."""
        self.prediction_id = prediction_id
        """The prediction that has the Idempotency-Key already, if that is the problem."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A step: send this; its result is the Answer."""

    method: str
    path: str
    params: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}
    content: bytes | None = None
    silence: float | None = None
    """Seconds without a byte after which the request fails; None: the client's own timeout."""

    @property
    def is_repeatable(self) -> bool:
        """Whether sending it twice has the same effect as sending it once."""
        return self.method in {"GET", "HEAD"} or "Idempotency-Key" in self.headers


class Answer(msgspec.Struct, frozen=True):
    """The answer to a request; that of an opened stream has no content yet."""

    status: int
    headers: httpx.Headers
    content: bytes = b""


class Sleep(msgspec.Struct, frozen=True):
    """A step: wait."""

    seconds: float


class OpenStream(msgspec.Struct, frozen=True):
    """A step: send this; the body of a successful answer is left to ReadChunk."""

    request: Request


class ReadChunk(msgspec.Struct, frozen=True):
    """A step: read the next chunk of the stream; b"" when it has ended."""


class Emit(msgspec.Struct, frozen=True):
    """A step: yield this to the caller."""

    value: Any


class Done(msgspec.Struct, frozen=True):
    """The end of the steps: what the call returns."""

    value: Any


Step: TypeAlias = Request | Sleep | OpenStream | ReadChunk | Emit
Steps: TypeAlias = Generator[Step, Any, T]


def advance(steps: Steps[Any], found: Any) -> Step | Done:
    """Give the generator the result of a step or its error, and return the next step.

    Raises ClientError if a request cannot be sent at all.
    """
    if isinstance(found, httpx.LocalProtocolError):  # never sent; its text may hold the key
        detail = "this cannot be sent: a header, the method or the path has an invalid character"
        raise ClientError("unfit", detail)
    try:
        is_error = isinstance(found, httpx.RequestError)
        return steps.throw(found) if is_error else steps.send(found)
    except StopIteration as end:
        return Done(end.value)


def pauses() -> Iterator[float]:
    """Yield the seconds to wait before the first repeat, the second, and so on."""
    seconds = _FIRST_PAUSE
    while True:
        yield seconds
        seconds = min(seconds * 2, _LONGEST_PAUSE)


def exchange(request: Request, url: str, patience: float) -> Steps[Answer]:
    """Send a request, and repeat it until it succeeds, while that is safe and `patience` lasts.

    `patience` limits the sum of the waits between repeats, in seconds. Raises ClientError.
    """
    pause = pauses()
    while True:
        try:
            answer = yield request
        except httpx.RequestError as error:
            detail = str(error) or type(error).__name__
            failure = ClientError("unreachable", f"no receiver answers at {url} ({detail})")
            failure.__cause__ = error
            may_repeat = request.is_repeatable or isinstance(error, _UNSENT)
        else:
            refused = refusal(answer, url)
            if refused is None:
                return answer  # type: ignore[no-any-return] # what a Request is answered with
            failure = refused
            lost = answer.status in _LOST and failure.type in _FOREIGN
            may_repeat = answer.status in _LATER or (lost and request.is_repeatable)
        seconds = max(next(pause), failure.retry_after or 0)
        patience -= seconds
        if not may_repeat or patience < 0:
            raise failure
        yield Sleep(seconds)


def refusal(answer: Answer, url: str) -> ClientError | None:
    """Return the error that an answer reports; None if it is a success."""
    if answer.status < 300:  # noqa: PLR2004 - where HTTP's good answers end
        return None
    later = whole(answer.headers.get("retry-after", ""), 9)
    if not answer.content and answer.headers.get("content-type") == "application/problem+json":
        kind = _OF_HEAD.get(answer.status, "http-error")
        detail = f"the receiver at {url} refuses this (HTTP {answer.status}, {kind})"
        return ClientError(kind, detail, status=answer.status, retry_after=later)
    try:
        body = msgspec.json.decode(answer.content)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        where = answer.headers.get("location") if answer.status < 400 else None  # noqa: PLR2004
        sent = f"; it redirects to {where}" if where else ""
        detail = f"what answers at {url} is not a receiver (HTTP {answer.status}){sent}"
        return ClientError("no-receiver", detail, status=answer.status, retry_after=later)
    fields = body if isinstance(body, dict) else {}
    kind = str(fields.get("type"))
    return ClientError(
        kind.removeprefix(PREFIX) if kind.startswith(PREFIX) else "http-error",
        str(fields.get("detail", body))[:_LONGEST_QUOTE],
        status=answer.status,
        retry_after=later,
        prediction_id=fields.get("prediction_id"),
    )


def whole(text: str, digits: int) -> int | None:
    """Return a whole number of at most so many digits; None if the text is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= digits else None


def read(answer: Answer, kind: type[T], url: str) -> T:
    """Return the decoded JSON of an answer; raise ClientError if it is not a receiver's."""
    try:
        return msgspec.json.decode(answer.content, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        detail = f"what answers at {url} is not a receiver, or one of another version ({error})"
        raise ClientError("no-receiver", detail, status=answer.status) from error
