"""Every operation of /openapi.json, declared once for both clients.

Each method returns a generator of steps; its decorator makes it a method of both clients.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from math import inf
from typing import Any, Final, Literal, NoReturn, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from receiver.client.declared import operation, stream
from receiver.client.follow import ENDS, OPEN, Frames, Message, current_place, follow, open_stream
from receiver.client.signatures import verify
from receiver.client.steps import ClientError, ReadChunk, Request, Steps, exchange, read
from receiver.model.answers import (
    Change,
    CostReport,
    Delivery,
    DiscardedItem,
    Drained,
    Explanation,
    HandlerState,
    Health,
    OfferedRecipe,
    Page,
    Readiness,
    Redelivered,
    Replay,
    Selection,
)
from receiver.model.states import TERMINAL
from receiver.model.values import Announcement, Mode, Prediction, Status

T = TypeVar("T")

_LONGEST_POLL: Final = 20
"""Seconds that one request waits for an end: proxies cut a connection that is silent for 30."""
_SHORT_POLL: Final = 1
"""The same if every status is to be reported."""
_KEPT_ALIVE: Final = 20.0
"""Seconds without a byte after which a wait polls: a proxy may buffer the stream."""
_ANY: Final[type[Any]] = Any
_DRAIN_MARGIN: Final = 30.0
"""Seconds without an answer after which a drain counts as lost, beyond its own duration."""


def ignore(_: str) -> None:
    """Ignore a notice."""


class Operations:
    """The operations of both clients. All raise ClientError."""

    url: str
    _patience: float

    verify = staticmethod(verify)

    # --- predictions ---

    @operation
    def submit(
        self,
        provider: str,
        model: str,
        input: Mapping[str, Any],
        *,
        metadata: Mapping[str, Any] | None = None,
        mode: Mode = "queue",
        reply_to: str | None = None,
        key: str | None = None,
        wait: int | None = None,
    ) -> Steps[Prediction]:
        """Submit a prediction once, even if the request has to be repeated.

        `key` is its Idempotency-Key. By default one is generated, which covers repeats in this
        call; give your own (an order's number, say) if your program may crash during the call.
        `wait`: return when the prediction has ended, or after this many seconds, 60 at most.
        """
        body = {
            "provider": provider,
            "model": model,
            "input": dict(input),
            "metadata": dict(metadata or {}),
            "mode": mode,
        } | _without_none(reply_to=reply_to)
        headers = _headers(key, wait)
        return self._send(Prediction, "POST", "/v1/predictions", body=body, headers=headers)

    @operation
    def get(self, prediction_id: str, *, wait: int | None = None) -> Steps[Prediction]:
        """Return a prediction; with `wait`, when it has ended or after that many seconds."""
        return self._read(prediction_id, wait)

    @operation
    def wait(
        self,
        prediction_id: str,
        seconds: float | None = None,
        *,
        after: int | None = None,
        changed: Callable[[Status], None] | None = None,
    ) -> Steps[Prediction]:
        """Wait until a prediction has ended, or for `seconds`; return its state then.

        It reads the live stream, and polls if there is none. `changed` is called with each status,
        also with earlier ones since `after`, a place that `place` returned before the submit.
        """
        until = inf if seconds is None else time.monotonic() + seconds
        watch = _Watch(after, changed or ignore)
        longest = _LONGEST_POLL if changed is None else _SHORT_POLL
        has_stream = True
        while True:
            if has_stream and until - time.monotonic() > longest:
                has_stream, found = yield from self._watch(prediction_id, until - longest, watch)
                if found is not None:
                    return found
            left = until - time.monotonic()
            found = yield from self._read(prediction_id, max(1, int(min(left, longest))))
            if not has_stream or found.status in TERMINAL:  # else the stream reports it
                watch.see(found.status)
            if found.status in TERMINAL or time.monotonic() >= until:
                return found

    @operation
    def list(
        self,
        *,
        status: str | None = None,
        provider: str | None = None,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
        since: datetime | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Steps[Page[Prediction]]:
        """List predictions, newest first; `cursor` is the `next_cursor` of the page before.

        `model` and the values of `metadata` are shell globs. With them a page may have fewer items
        than `limit`; only the last page has None as `next_cursor`.
        """
        params = _query(
            metadata,
            status=status,
            provider=provider,
            model=model,
            since=since,
            limit=limit,
            cursor=cursor,
        )
        return self._send(Page[Prediction], "GET", "/v1/predictions", params)

    @operation
    def cancel(self, prediction_id: str) -> Steps[Prediction]:
        """Cancel a prediction at its provider; it may have succeeded meanwhile."""
        return self._send(Prediction, "POST", path_of("predictions", prediction_id, "cancel"))

    @operation
    def replay(self, prediction_id: str) -> Steps[Redelivered]:
        """Redeliver a prediction's event to its handlers."""
        return self._send(Redelivered, "POST", path_of("predictions", prediction_id, "replay"))

    @operation
    def erase(self, prediction_id: str) -> Steps[Prediction]:
        """Erase the input, metadata and outputs of a prediction; its ids, status and times stay."""
        return self._send(Prediction, "POST", path_of("predictions", prediction_id, "erase"))

    @operation
    def explain(
        self,
        name: str,
        *,
        type: Literal["succeeded", "failed", "canceled"] | None = None,
    ) -> Steps[Explanation]:
        """Return which handlers run for a prediction's event, and why the others do not."""
        path = path_of("predictions", name, "explain")
        return self._send(Explanation, "GET", path, _query(type=type))

    @operation
    def model(self, provider: str, model: str) -> Steps[Any]:
        """Fetch the provider's own description of a model."""
        return self._send(_ANY, "GET", path_of("models", provider, model))

    # --- recipes ---

    @operation
    def recipes(self) -> Steps[Page[OfferedRecipe]]:
        """List recipes, each with a JSON Schema of its options."""
        return self._send(Page[OfferedRecipe], "GET", "/v1/recipes")

    @operation
    def order(
        self,
        recipe: str,
        options: Mapping[str, Any],
        *,
        person: str | None = None,
        place: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        reply_to: str | None = None,
        key: str | None = None,
        wait: int | None = None,
    ) -> Steps[Prediction]:
        """Order by a recipe once, even if the request has to be repeated.

        `key` and `wait` are as in `submit`. With `person` or `place`, the recipes' allow lists and
        limits apply.
        """
        body = {"options": dict(options), "metadata": dict(metadata or {})}
        body |= _without_none(person=person, place=place, reply_to=reply_to)
        headers = _headers(key, wait)
        return self._send(
            Prediction, "POST", path_of("recipes", recipe), body=body, headers=headers
        )

    # --- events ---

    @operation
    def place(self) -> Steps[int | None]:
        """Return the current place of the live stream, to pass as `after` for later messages."""
        return current_place(self.url, self._patience)

    @stream
    def events(
        self,
        after: int | None = None,
        *,
        provider: str | Sequence[str] | None = None,
        prediction: str | None = None,
        metadata: Mapping[str, str] | None = None,
        on_loss: Callable[[str], None] = ignore,
    ) -> Steps[NoReturn]:
        """Yield the ends of predictions, for ever, after a place (0: all; None: from now on).

        After a lost connection it resumes without a gap or a repeat; if that is not possible, it
        yields a `stream.gap`. `on_loss` is called with the reason of each loss.
        """
        params = _query(metadata, type=ENDS, provider=provider, prediction=prediction)
        return follow(params, after, on_loss, self.url)

    @stream
    def changes(
        self,
        after: int | None = None,
        *,
        type: str | Sequence[str] | None = None,
        provider: str | Sequence[str] | None = None,
        prediction: str | None = None,
        metadata: Mapping[str, str] | None = None,
        deliveries: bool = False,
        on_loss: Callable[[str], None] = ignore,
    ) -> Steps[NoReturn]:
        """Yield every change of a status, as `events` does; `type` selects statuses.

        With `deliveries`, also the ends of handlers' attempts; those during a lost connection are
        not repeated.
        """
        params = _query(metadata, type=type, provider=provider, prediction=prediction)
        params |= _query(deliveries="true" if deliveries else None)
        return follow(params, after, on_loss, self.url)

    @operation
    def list_events(
        self,
        *,
        type: str | Sequence[str] | None = None,
        provider: str | Sequence[str] | None = None,
        metadata: Mapping[str, str] | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Steps[Page[Announcement]]:
        """List events, newest first."""
        params = _query(metadata, type=type, provider=provider, limit=limit, cursor=cursor)
        return self._send(Page[Announcement], "GET", "/v1/events", params)

    # --- deliveries and handlers ---

    @operation
    def deliveries(
        self,
        *,
        state: str | None = None,
        handler: str | None = None,
        prediction: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Steps[Page[Delivery]]:
        """List deliveries, newest first."""
        given = _query(
            state=state, handler=handler, prediction=prediction, limit=limit, cursor=cursor
        )
        return self._send(Page[Delivery], "GET", "/v1/deliveries", given)

    @operation
    def retry(self, delivery_id: str) -> Steps[Delivery]:
        """Retry a dead or skipped delivery, or a pending one at once."""
        return self._send(Delivery, "POST", path_of("deliveries", delivery_id, "retry"))

    @operation
    def drain(
        self, seconds: int = 25, *, method: Literal["POST", "GET"] = "POST"
    ) -> Steps[Drained]:
        """Run due work; return when it is done, or after `seconds`."""
        return self._send(
            Drained, method, "/v1/drain", {"seconds": str(seconds)}, silence=seconds + _DRAIN_MARGIN
        )

    @operation
    def handlers(self) -> Steps[Page[HandlerState]]:
        """List handlers, each with its state and the number of pending deliveries."""
        return self._send(Page[HandlerState], "GET", "/v1/handlers")

    @operation
    def pause(self, handler: str) -> Steps[HandlerState]:
        """Pause a handler: its deliveries stay pending."""
        return self._send(HandlerState, "POST", path_of("handlers", handler, "pause"))

    @operation
    def resume(self, handler: str) -> Steps[HandlerState]:
        """Resume a handler: its deliveries run again."""
        return self._send(HandlerState, "POST", path_of("handlers", handler, "resume"))

    # --- bulk replays, discarded outcomes, costs ---

    @operation
    def count_replay(self, wanted: Selection) -> Steps[Replay]:
        """Count the deliveries that match, to redeliver them by `start_replay`."""
        body = _without_none(**msgspec.structs.asdict(wanted))
        return self._send(Replay, "POST", "/v1/replays", body=body)

    @operation
    def start_replay(self, replay_id: str) -> Steps[Replay]:
        """Start a replay that was counted; a second call changes nothing."""
        return self._send(Replay, "POST", path_of("replays", replay_id, "start"))

    @operation
    def cancel_replay(self, replay_id: str) -> Steps[Replay]:
        """Stop a replay; what it has redelivered stays pending."""
        return self._send(Replay, "POST", path_of("replays", replay_id, "cancel"))

    @operation
    def get_replay(self, replay_id: str) -> Steps[Replay]:
        """Return a replay with its progress."""
        return self._send(Replay, "GET", path_of("replays", replay_id))

    @operation
    def replays(
        self, *, limit: int | None = None, cursor: str | None = None
    ) -> Steps[Page[Replay]]:
        """List replays, newest first."""
        return self._send(Page[Replay], "GET", "/v1/replays", _query(limit=limit, cursor=cursor))

    @operation
    def discarded(
        self,
        *,
        kind: str | None = None,
        provider: str | None = None,
        prediction: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Steps[Page[DiscardedItem]]:
        """List outcomes and calls that reached no handler, latest first."""
        given = _query(
            kind=kind, provider=provider, prediction=prediction, limit=limit, cursor=cursor
        )
        return self._send(Page[DiscardedItem], "GET", "/v1/discarded", given)

    @operation
    def costs(
        self,
        *,
        since: date | None = None,
        until: date | None = None,
        by: Sequence[str] = ("day",),
    ) -> Steps[CostReport]:
        """Return the costs from one UTC day up to before another, by groups.

        `by` contains some of day, provider, model, recipe, key and metadata.NAME.
        """
        given = _query(since=since, until=until, by=by)
        return self._send(CostReport, "GET", "/v1/costs", given)

    # --- the receiver itself ---

    @operation
    def alive(self) -> Steps[Health]:
        """Return whether the process is alive."""
        return self._send(Health, "GET", "/healthz")

    @operation
    def ready(self) -> Steps[Readiness]:
        """Return whether the database takes writes; raise ClientError (503) if not."""
        return self._send(Readiness, "GET", "/readyz")

    @operation
    def metrics(self) -> Steps[str]:
        """Return the metrics, in the format of Prometheus."""
        return self._text("/metrics")

    @operation
    def about(self) -> Steps[str]:
        """Return the receiver's description of itself, a few lines of text."""
        return self._text("/")

    @operation
    def openapi(self) -> Steps[dict[str, Any]]:
        """Return the OpenAPI document."""
        return self._send(dict[str, Any], "GET", "/openapi.json")

    @operation
    def docs(self) -> Steps[str]:
        """Return the documentation of the API as HTML."""
        return self._text("/docs")

    @operation
    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Steps[Any]:
        """Send any request, and return the JSON of the answer as it is; `path` begins with a /."""
        if not path.startswith("/"):  # a URL would send the key to another server
            raise ClientError("unfit", f"{path!r} is not a path: it must begin with a /")
        return self._send(_ANY, method, path, body=body, headers=headers)

    # --- internals ---

    def _send(
        self,
        kind: type[T],
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        *,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        silence: float | None = None,
    ) -> Steps[T]:
        try:
            content = None if body is None else msgspec.json.encode(body)
        except (TypeError, ValueError, RecursionError) as error:
            raise ClientError("unfit", f"this cannot be sent as JSON: {error}") from error
        request = Request(
            method=method,
            path=path,
            params=params or {},
            headers={
                **({"Content-Type": "application/json"} if body is not None else {}),
                **(headers or {}),
            },
            content=content,
            silence=silence,
        )
        return read((yield from exchange(request, self.url, self._patience)), kind, self.url)

    def _text(self, path: str) -> Steps[str]:
        request = Request(method="GET", path=path)
        answer = yield from exchange(request, self.url, self._patience)
        return answer.content.decode("utf-8", "replace")

    def _read(self, prediction_id: str, wait: int | None = None) -> Steps[Prediction]:
        headers = {} if wait is None else {"Prefer": f"wait={wait}"}
        return self._send(Prediction, "GET", path_of("predictions", prediction_id), headers=headers)

    def _watch(
        self, prediction_id: str, until: float, watch: _Watch
    ) -> Steps[tuple[bool, Prediction | None]]:
        """Watch the stream for the end of a prediction; return also whether there is a stream."""
        is_open = False
        try:
            answer = yield open_stream({"prediction": prediction_id}, watch.after, _KEPT_ALIVE)
            frames = Frames()
            while answer.status == httpx.codes.OK and (chunk := (yield ReadChunk())):
                for message in frames.feed(chunk):
                    is_open = True
                    found = yield from self._handle_message(prediction_id, message, watch)
                    if found is not None:
                        return is_open, found
                if time.monotonic() >= until:
                    break
        except httpx.RequestError:
            pass
        return is_open, None

    def _handle_message(
        self, prediction_id: str, message: Message, watch: _Watch
    ) -> Steps[Prediction | None]:
        """Handle a message; return the prediction if it has ended."""
        is_begun, watch.after = watch.after is not None, message.seq
        content = None if message.type == OPEN else message.content
        if isinstance(content, Change):
            watch.see(content.prediction.status)
            return None
        if isinstance(content, Announcement):
            found = content.prediction
        elif is_begun and message.type == OPEN:
            return None  # later messages report all changes since
        else:
            found = yield from self._read(prediction_id)
        watch.see(found.status)
        return found if found.status in TERMINAL else None


class _Watch:
    """The state of a wait: reports each new status once, and keeps the place in the stream."""

    def __init__(self, after: int | None, changed: Callable[[Status], None]) -> None:
        self.after = after
        self._changed = changed
        self._last: Status | None = None

    def see(self, status: Status) -> None:
        if status != self._last:
            self._last = status
            self._changed(status)


def path_of(*parts: str) -> str:
    """Return a path of /v1."""
    return "/".join(("/v1", *(quote(part, safe="", errors="surrogatepass") for part in parts)))


def _headers(key: str | None, wait: int | None) -> dict[str, str]:
    """Return the headers of a submit; without a key, one is generated. Raises ClientError."""
    key = os.urandom(16).hex() if key is None else key
    if not key or not (key.isascii() and key.isprintable()):
        raise ClientError("unfit", f"key must be printable ASCII and not empty, not {key[:40]!r}")
    headers = {"Idempotency-Key": key}
    return headers if wait is None else headers | {"Prefer": f"wait={wait}"}


def _without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _query(
    metadata: Mapping[str, str] | None = None,
    /,
    **params: str | int | date | Sequence[str] | None,
) -> dict[str, str]:
    """Return the query: the parameters that are not None, and the filters by metadata."""
    filters = {f"metadata.{name}": value for name, value in (metadata or {}).items()}
    return filters | {
        name: _query_value(value) for name, value in params.items() if value or value == 0
    }


def _query_value(value: str | int | date | Sequence[str] | None) -> str:
    if isinstance(value, date):
        return value.isoformat()
    return str(value) if isinstance(value, str | int) else ",".join(value or ())
