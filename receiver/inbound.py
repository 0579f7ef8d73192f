"""What the world may send us: callbacks, the /v1 API, and two questions about health."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import asdict
from typing import Any, Final, Literal, Protocol

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from receiver.dispatch.registry import TYPES, Explained
from receiver.errors import KeysUnavailable, Problem, StoreUnavailable, Unproved
from receiver.inbox import Waiters
from receiver.model import TERMINAL, Mode, Prediction, Status
from receiver.providers.base import Callback
from receiver.settings import Settings
from receiver.store.values import Filter, Found, Replayed, Taken

log = structlog.get_logger("receiver")

_LONGEST_WAIT: Final = 60.0
_DRAIN: Final = 25.0
_LONGEST_DRAIN: Final = 900
"""Seconds; serverless platforms end a request after so many at the latest."""
_SYNC_WAIT: Final = 60.0
_LONGEST_KEY: Final = 255
_LONGEST_NAME: Final = 300
_LONGEST_LIMIT: Final = 9
_DEEPEST: Final = 64
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_LOCAL_HOST: Final = re.compile(
    r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.ASCII | re.IGNORECASE
)
_PROXY_HEADERS: Final = frozenset({"forwarded", "via", "x-real-ip", "cf-connecting-ip"})
GONE: Final = "no such handler is registered here any more"
_STATES: Final = ("pending", "running", "done", "skipped", "dead")

# --- callbacks: the hot path ---------------------------------------------------------------------


class Door(Protocol):
    """What the callback route needs of the inbox."""

    def opens(self, provider_name: str, token: str) -> str | None: ...
    async def callback(
        self, provider_name: str, prediction_id: str, callback: Callback
    ) -> Taken: ...


class Disconnected(Exception):
    """The sender went away in the middle of its request."""


class TooLarge(Exception):
    """More bytes came than we take."""


async def read_body(receive: Receive, most: int, *, keep: bool = True) -> bytes:
    """Read a request's body, counting while it streams; raise TooLarge at the first byte over.

    Without `keep` it is only counted: a stranger's bytes need no memory.
    """
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > most:
            raise TooLarge
        if keep or not chunks:
            chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _raw(
    status: int, body: bytes, *more: tuple[bytes, bytes]
) -> tuple[dict[str, Any], dict[str, Any]]:
    headers = [
        (b"content-type", b"application/json" if status < 400 else b"application/problem+json"),  # noqa: PLR2004
        (b"content-length", str(len(body)).encode()),
        *more,
    ]
    return (
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body},
    )


def _raw_problem(
    status: int, kind: str, detail: str, *more: tuple[bytes, bytes]
) -> tuple[dict[str, Any], dict[str, Any]]:
    return _raw(status, _problem_body(status, kind, detail), *more)


_WORDS: Final = {"accepted": "accepted", "duplicate": "duplicate", "late": "duplicate"}
_TAKEN: Final = {
    word: _raw(200, msgspec.json.encode({"status": word})) for word in ("accepted", "duplicate")
}
_CLOSE: Final = (b"connection", b"close")
_SLOWEST: Final = 60.0
"""Seconds a callback's body may take; a provider's own patience is shorter."""
_RETRY_SOON: Final = (b"retry-after", b"5")


class Hook:
    """`POST /webhooks/{provider}/{token}` as a bare ASGI app: nothing stands before the proof.

    Answers 200 only after the commit; 401 for whatever is not proved, with no word of why; 413 and
    503 as their names say. It never redirects, as providers take a 3xx for a refusal.
    """

    def __init__(
        self,
        door: Door,
        providers: Collection[str],
        most: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._door = door
        self._providers = frozenset(providers)
        self._most = most
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        params = scope["path_params"]
        provider = params["provider"]
        made = self._door.opens(provider, params["token"]) if provider in self._providers else None
        try:
            async with asyncio.timeout(_SLOWEST):
                body = await read_body(receive, self._most, keep=made is not None)
        except Disconnected:
            return
        except TimeoutError:
            start, content = _raw_problem(
                408, "too-slow", f"the body took longer than {_SLOWEST:g} s", _CLOSE
            )
        except TooLarge:
            start, content = _raw_problem(413, "too-large", f"more than {self._most} bytes", _CLOSE)
        else:
            start, content = await self._answer(scope, provider, made, body)
        await send(start)
        await send(content)

    async def _answer(
        self, scope: Scope, provider: str, prediction_id: str | None, body: bytes
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if provider not in self._providers:
            return _raw_problem(404, "not-found", "no such provider")
        callback = Callback(scope["headers"], body, self._clock())
        if prediction_id is None:
            return _unproved(scope, provider, "bad_token", len(body))
        try:
            taken = await self._door.callback(provider, prediction_id, callback)
        except Unproved as error:
            return _unproved(scope, provider, error.reason, len(body))
        except StoreUnavailable:
            return _raw_problem(503, "unavailable", "try again later", _RETRY_SOON)
        except KeysUnavailable:
            return _raw_problem(503, "keys-unavailable", "try again later", _RETRY_SOON)
        return _TAKEN[_WORDS.get(taken.verdict, "accepted")]


def _unproved(
    scope: Scope, provider: str, reason: str, size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Refuse; the reason is for the log alone."""
    client = (scope.get("client") or ("unknown",))[0]
    log.warning("callback.rejected", provider=provider, reason=reason, client=client, bytes=size)
    return _raw_problem(401, "unproved", "this callback could not be proved")


# --- the API -------------------------------------------------------------------------------------


class Outbound(Protocol):
    """What the API needs of outbound."""

    async def submit(
        self,
        provider: str,
        model: str,
        input: dict[str, Any],
        *,
        metadata: dict[str, Any] | None = None,
        mode: Mode = "queue",
        idempotency_key: str | None = None,
    ) -> Prediction: ...
    async def cancel(self, prediction_id: str) -> Prediction: ...
    async def details(self, provider: str, model: str) -> Any: ...


class Reads(Protocol):
    """What the API needs of the store."""

    async def prediction(self, prediction_id: str) -> Prediction | None: ...
    async def predictions(self, wanted: Filter) -> Found: ...
    async def deliveries(self, limit: int, **given: str | None) -> Found: ...
    async def retry(self, delivery_id: str, now: float) -> str | None: ...
    async def probe(self, now: float) -> None: ...


class Submission(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /v1/predictions`."""

    provider: str
    model: str
    input: dict[str, Any]
    metadata: dict[str, Any] = {}
    mode: Literal["queue", "sync"] = "queue"


class Drained(msgspec.Struct, frozen=True):
    """What a drain has done: attempts ended, submits and looks at providers begun."""

    deliveries: int
    submits: int
    polls: int
    more: bool
    """The time was over before there was nothing left to do."""


class Api:
    """The /v1 routes; each wants a key, unless a developer's own machine asks."""

    def __init__(
        self,
        settings: Settings,
        store: Reads,
        outbound: Outbound,
        waiters: Waiters,
        *,
        replay: Callable[[str], Any],
        wake: Callable[[tuple[str, ...]], None],
        drain: Callable[[float], Awaitable[Drained]],
        explain: Callable[[str, Prediction], list[Explained]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._keys = [key.reveal().encode() for key in settings.api_keys]
        self._store = store
        self._outbound = outbound
        self._waiters = waiters
        self._replay = replay
        self._wake = wake
        self._drain = drain
        self._explain = explain
        self._clock = clock
        self.stopping = False

    def routes(self) -> list[Route]:
        one = "/v1/predictions/{id}"
        return [
            self._route("/v1/predictions", GET=self.list_predictions, POST=self.submit),
            self._route(one, GET=self.read),
            self._route(one + "/cancel", POST=self.cancel),
            self._route(one + "/replay", POST=self.replay),
            self._route(one + "/explain", GET=self.explain),
            self._route("/v1/deliveries", GET=self.list_deliveries),
            self._route("/v1/deliveries/{id}/retry", POST=self.retry),
            self._route("/v1/drain", POST=self.drain),
            self._route("/v1/models/{provider}/{model:path}", GET=self.model),
        ]

    def _route(self, path: str, **endpoints: Callable[[Request], Any]) -> Route:
        async def guarded(request: Request) -> Response:
            self._authorize(request)
            method = "GET" if request.method == "HEAD" else request.method
            response: Response = await endpoints[method](request)
            return response

        return Route(path, guarded, methods=list(endpoints))

    async def submit(self, request: Request) -> Response:
        body = await self._json(request)
        key = request.headers.get("idempotency-key")
        if key is not None and not (0 < len(key) <= _LONGEST_KEY and key.isprintable()):
            raise Problem(422, "invalid-request", "Idempotency-Key must be 1 to 255 characters")
        wait = _prefer_wait(request.headers)
        given = _submission(body)
        prediction = await self._outbound.submit(
            given.provider,
            given.model,
            given.input,
            metadata=given.metadata,
            mode=given.mode,
            idempotency_key=key,
        )
        if wait is None and given.mode == "sync":
            wait = _SYNC_WAIT
        if wait is not None and prediction.status not in TERMINAL:
            prediction = await self._wait(prediction, wait)
        return _prediction(prediction, wait)

    async def list_predictions(self, request: Request) -> Response:
        params = _params(request, "status", "provider", "limit", "cursor")
        if params["status"] is not None and params["status"] not in set(Status):
            raise Problem(422, "invalid-request", f"status must be one of {', '.join(Status)}")
        found = await self._store.predictions(
            Filter(
                status=params["status"],
                provider=params["provider"],
                limit=_limit(params["limit"]),
                cursor=params["cursor"],
            )
        )
        return _json(found)

    async def read(self, request: Request) -> Response:
        prediction = await self._store.prediction(request.path_params["id"])
        if prediction is None:
            raise Problem(404, "not-found", "no such prediction")
        wait = _prefer_wait(request.headers)
        if wait is not None and prediction.status not in TERMINAL:
            prediction = await self._wait(prediction, wait)
        return _json(prediction)

    async def cancel(self, request: Request) -> Response:
        prediction = await self._outbound.cancel(request.path_params["id"])
        return _prediction(prediction, None)

    async def replay(self, request: Request) -> Response:
        prediction_id = request.path_params["id"]
        if await self._store.prediction(prediction_id) is None:
            raise Problem(404, "not-found", "no such prediction")
        replayed: Replayed = await self._replay(prediction_id)
        if replayed.owed is None:
            raise Problem(409, "not-ended", "the prediction has not ended: there is no event yet")
        self._wake(replayed.handlers)
        return _json({"owed": replayed.owed, "handlers": replayed.handlers}, 202)

    async def explain(self, request: Request) -> Response:
        """Say which handlers run for a prediction's event, or would for one of a given type."""
        given = _params(request, "type")["type"]
        if given is not None and given not in TYPES:
            raise Problem(422, "invalid-request", f"type must be one of {', '.join(TYPES)}")
        # An event is named after its prediction, and either name will do.
        name = request.path_params["id"]
        prediction_id = f"pred_{name[4:]}" if name.startswith("evt_") else name
        prediction = await self._store.prediction(prediction_id)
        if prediction is None:
            raise Problem(404, "not-found", "no such prediction or event")
        has_ended = prediction.status in TERMINAL
        kind = given or (prediction.status if has_ended else "succeeded")
        found = await self._store.deliveries(100, prediction=prediction_id)
        deliveries = {delivery.handler: delivery for delivery in found.data}
        handlers = [
            {**asdict(explained), "delivery": deliveries.pop(explained.handler, None)}
            for explained in self._explain(f"prediction.{kind}", prediction)
        ]
        gone = [
            {"handler": name, "runs": False, "reason": GONE, "after": (), "delivery": delivery}
            for name, delivery in deliveries.items()
        ]
        return _json(
            {
                "prediction": prediction_id,
                "type": f"prediction.{kind}",
                "assumed": given is not None or not has_ended,
                "handlers": [*handlers, *gone],
            }
        )

    async def list_deliveries(self, request: Request) -> Response:
        params = _params(request, "state", "handler", "prediction", "limit", "cursor")
        limit = _limit(params.pop("limit"))
        if params["state"] is not None and params["state"] not in _STATES:
            raise Problem(422, "invalid-request", f"state must be one of {', '.join(_STATES)}")
        return _json(await self._store.deliveries(limit, **params))

    async def retry(self, request: Request) -> Response:
        delivery_id = request.path_params["id"]
        handler = await self._store.retry(delivery_id, self._clock())
        found = await self._store.deliveries(1, id=delivery_id)
        if not found.data:
            raise Problem(404, "not-found", "no such delivery")
        if handler is None:
            raise Problem(
                409, "not-retryable", f"the delivery is {found.data[0].state}: nothing to retry"
            )
        self._wake((handler,))
        return _json(found.data[0], 202)

    async def drain(self, request: Request) -> Response:
        """Run what is due and answer when that is done, or when the time is over."""
        text = _params(request, "seconds")["seconds"]
        seconds = _DRAIN if text is None else _drain_seconds(text)
        return _json(await self._drain(seconds))

    async def model(self, request: Request) -> Response:
        params = request.path_params
        return _json(await self._outbound.details(params["provider"], params["model"]))

    async def _wait(self, prediction: Prediction, seconds: float) -> Prediction:
        """Wait for the end of a prediction, as long as the caller said, or until we stop."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        with self._waiters.watch(prediction.id) as news:
            while True:
                news.clear()
                found = await self._store.prediction(prediction.id) or prediction
                if found.status in TERMINAL or self.stopping or loop.time() >= until:
                    return found
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        await news.wait()

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        scheme, _, text = given.partition(" ")
        key = text.strip().encode("utf-8", "surrogateescape")
        # Every key is compared, so that the time taken does not tell which one was nearly right.
        known = any([hmac.compare_digest(key, mine) for mine in self._keys])  # noqa: C419
        if scheme.lower() == "bearer" and known:
            return
        if self._settings.dev and not given and _is_local(request):
            return
        raise Problem(
            401, "unauthorized", "send Authorization: Bearer with one of RECEIVER_API_KEYS"
        )

    async def _json(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(415, "unsupported-media-type", "send Content-Type: application/json")
        try:
            return await read_body(request.receive, self._settings.max_body_bytes)
        except TooLarge:
            raise Problem(
                413, "too-large", f"more than {self._settings.max_body_bytes} bytes"
            ) from None
        except Disconnected:
            raise HTTPException(499) from None


def _is_local(request: Request) -> bool:
    """Tell a caller on this machine from one who comes through a proxy, a tunnel or a web page."""
    client = request.client.host if request.client else ""
    # A bare proxy_pass adds no header, but speaks HTTP/1.0, which no client of today does.
    forwarded = request.scope["http_version"] == "1.0" or any(
        name in _PROXY_HEADERS or name.startswith("x-forwarded-") for name in request.headers
    )
    crossed = request.headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}
    return (
        client in _LOOPBACK
        and not forwarded
        and not crossed
        and "origin" not in request.headers
        and _LOCAL_HOST.fullmatch(request.headers.get("host", "")) is not None
    )


def _submission(body: bytes) -> Submission:
    try:
        given = msgspec.json.decode(body, type=Submission)
    except msgspec.ValidationError as error:
        raise Problem(422, "invalid-request", str(error)) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise Problem(400, "invalid-json", "the body is not JSON") from error
    if not 0 < len(given.model) <= _LONGEST_NAME or not given.model.isprintable():
        raise Problem(422, "invalid-request", "model must be 1 to 300 printable characters")
    if _depth(given.input) > _DEEPEST or _depth(given.metadata) > _DEEPEST:
        raise Problem(422, "invalid-request", f"input and metadata nest at most {_DEEPEST} deep")
    return given


def _depth(value: Any) -> int:
    """Measure how deep a JSON value nests, without recursion."""
    deepest = 0
    left = [(value, 1)]
    while left:
        item, depth = left.pop()
        deepest = max(deepest, depth)
        if isinstance(item, dict):
            left.extend((inner, depth + 1) for inner in item.values())
        elif isinstance(item, list):
            left.extend((inner, depth + 1) for inner in item)
    return deepest


def _prefer_wait(headers: Mapping[str, str]) -> float | None:
    """Read `Prefer: wait=N` (RFC 7240) in seconds; what we do not understand is ignored."""
    for preference in headers.get("prefer", "").lower().split(","):
        name, _, value = preference.partition(";")[0].strip().partition("=")
        if name.strip() == "wait":
            digits = value.strip().strip('"') or "60"
            if digits.isdecimal() and digits.isascii():
                return min(max(float(digits), 1.0), _LONGEST_WAIT)
    return None


def _params(request: Request, *names: str) -> dict[str, str | None]:
    unknown = sorted(set(request.query_params) - set(names))
    if unknown:
        raise Problem(422, "invalid-request", f"unknown parameter {', '.join(unknown)}")
    return {name: request.query_params.get(name) or None for name in names}


def _limit(text: str | None) -> int:
    if text is None:
        return 50
    digits = text.isascii() and text.isdecimal() and len(text) <= _LONGEST_LIMIT
    if not digits or not 1 <= int(text) <= 100:  # noqa: PLR2004
        raise Problem(422, "invalid-request", "limit must be 1 to 100")
    return int(text)


def _drain_seconds(text: str) -> float:
    digits = text.isascii() and text.isdecimal() and len(text) <= _LONGEST_LIMIT
    if not digits or not 1 <= int(text) <= _LONGEST_DRAIN:
        raise Problem(422, "invalid-request", f"seconds must be 1 to {_LONGEST_DRAIN}")
    return float(text)


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def _prediction(prediction: Prediction, waited: float | None) -> Response:
    response = _json(prediction, 200 if prediction.status in TERMINAL else 202)
    response.headers["Location"] = f"/v1/predictions/{prediction.id}"
    if waited is not None:
        response.headers["Preference-Applied"] = f"wait={waited:g}"
    return response


# --- health and errors ---------------------------------------------------------------------------


def health_routes(store: Reads, clock: Callable[[], float] = time.time) -> list[Route]:
    async def healthz(_: Request) -> Response:
        return _json({"status": "ok"})

    async def readyz(_: Request) -> Response:
        await store.probe(clock())
        return _json({"status": "ok"})

    return [Route("/healthz", healthz), Route("/readyz", readyz)]


_TITLES: Final = {
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
}


def _problem_body(status: int, kind: str, detail: str, **extra: object) -> bytes:
    return msgspec.json.encode(
        {
            "type": f"urn:receiver:problem:{kind}",
            "title": _TITLES.get(status, "Error"),
            "status": status,
            "detail": detail,
            **extra,
        }
    )


def _problem(
    status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None, **extra: object
) -> Response:
    return Response(
        _problem_body(status, kind, detail, **extra),
        status,
        headers=headers,
        media_type="application/problem+json",
    )


async def _on_problem(_: Request, error: Exception) -> Response:
    if not isinstance(error, Problem):
        raise error
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}  # noqa: PLR2004
    if "retry_after" in error.extra:
        headers["Retry-After"] = str(error.extra["retry_after"])
    return _problem(error.status, error.type, error.detail, headers, **error.extra)


async def _on_unavailable(_: Request, error: Exception) -> Response:  # noqa: ARG001 - Starlette's shape
    return _problem(503, "unavailable", "the database does not take writes", {"Retry-After": "5"})


async def _on_http(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    kind = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "http-error")
    return _problem(error.status_code, kind, error.detail, error.headers)


async def _on_fault(request: Request, error: Exception) -> Response:
    log.error("request.failed", path=request.url.path[:40], exc_info=error)
    return _problem(500, "internal-error", "a fault of ours; it is in the log")


ERROR_HANDLERS: Final[dict[Any, Any]] = {
    Problem: _on_problem,
    StoreUnavailable: _on_unavailable,
    HTTPException: _on_http,
    Exception: _on_fault,
}
