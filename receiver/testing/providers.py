"""The three providers as a test needs them: they take what is submitted, and say what it is told.

They speak as they really do, so that what a test delivers comes in by the same door, is proved,
read and recorded like anything else.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import msgspec

from receiver.emulator.keys import Keyring
from receiver.model.values import Event, Output

SETTINGS: Final = {
    "OXEN_API_KEY": "oxen-key-of-a-test",
    "EACHLABS_API_KEY": "eachlabs-key-of-a-test",
    "FAL_KEY": "fal-key-of-a-test",
    "OXEN_BASE_URL": "https://oxen.test",
    "EACHLABS_BASE_URL": "https://eachlabs.test",
    "FAL_QUEUE_URL": "https://queue.fal.test",
    "FAL_RUN_URL": "https://run.fal.test",
    "FAL_JWKS_URL": "https://rest.fal.test/jwks.json",
}
_HINTS: Final = {
    "content_policy": "content_policy_violation",
    "timeout": "generation_timeout",
    "provider_error": "downstream_service_error",
}
_FAILED: Final = 422


class Taken:
    """One prediction at its provider."""

    def __init__(self, provider: str, provider_id: str, hook: str, secret: str) -> None:
        self.provider = provider
        self.id = provider_id
        self.path = urlsplit(hook).path
        """Where its callback goes; empty where none was asked for."""
        self.secret = secret
        self.event: Event | None = None
        """How it ends; None: it is still at work."""


class Providers(httpx.AsyncBaseTransport):
    """All of them behind one transport."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._keyring = Keyring(random.Random(7))  # noqa: S311 - for a test's signatures
        self._taken: dict[str, Taken] = {}
        self._streams: list[asyncio.Queue[bytes]] = []
        self.refusal: httpx.Response | httpx.TransportError | None = None
        """What the next submit gets instead of being taken."""

    def taken(self, provider_id: str) -> Taken:
        return self._taken[provider_id]

    def callback(self, taken: Taken, event: Event) -> tuple[dict[str, str], bytes]:
        """Write the headers and the body with which a provider calls back."""
        body = json.dumps(_CALLBACKS[taken.provider](taken.id, event)).encode()
        if taken.provider == "eachlabs":
            return {"x-webhook-secret": taken.secret}, body
        return self._keyring.headers(taken.id, "user-1", int(self._clock()), body), body

    def say(self, taken: Taken, event: Event) -> None:
        """Tell it on Oxen.ai's event stream."""
        data = {"generation_id": taken.id, **_oxen(event, url="url", reason="error")}
        text = f"event: media_generation_completed\ndata: {json.dumps(data)}\n\n"
        for stream in self._streams:
            stream.put_nowait(text.encode())

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        host, path = request.url.host, request.url.path
        if path == "/jwks.json":
            return httpx.Response(200, json=self._keyring.published(padded=True))
        if path == "/api/events":
            stream = _Stream()
            self._streams.append(stream.said)
            return httpx.Response(200, headers=_EVENT_STREAM, stream=stream)
        provider = {"oxen.test": "oxen", "eachlabs.test": "eachlabs"}.get(host, "fal")
        if request.method == "POST" and not path.endswith("/cancel"):
            return self._take(provider, request)
        return self._tell(provider, path.split("/"))

    def _take(self, provider: str, request: httpx.Request) -> httpx.Response:
        refusal, self.refusal = self.refusal, None
        if isinstance(refusal, httpx.Response):
            return refusal
        if refusal is not None:
            raise refusal
        body: dict[str, Any] = msgspec.json.decode(request.content)
        hook = body.get("webhook_url") or request.url.params.get("fal_webhook", "")
        taken = Taken(provider, f"req-{len(self._taken) + 1}", hook, body.get("webhook_secret", ""))
        self._taken[taken.id] = taken
        url = f"https://queue.fal.test/requests/{taken.id}"
        answers: dict[str, dict[str, Any]] = {
            "oxen": {"generations": [{"generation_id": taken.id, "status": "queued"}]},
            "eachlabs": {"status": "success", "predictionID": taken.id},
            "fal": {
                "request_id": taken.id,
                "status_url": f"{url}/status",
                "response_url": url,
                "cancel_url": f"{url}/cancel",
            },
        }
        return httpx.Response(200, json=answers[provider])

    def _tell(self, provider: str, path: list[str]) -> httpx.Response:
        """Answer a poll, or a wish to cancel, which a poll will show to have been granted."""
        taken = next((self._taken[part] for part in path if part in self._taken), None)
        if taken is None:
            return httpx.Response(404, json={"detail": "no such request"})
        if provider == "fal":
            return _fal_polled(taken, path[-1])
        if taken.event is None:
            return httpx.Response(200, json={**_ids(taken.id), "status": "processing"})
        words = _eachlabs(taken.event)
        if provider == "oxen":
            words = _oxen(taken.event, url="result_url", reason="error_message")
        return httpx.Response(200, json={**_ids(taken.id), **words})


_EVENT_STREAM: Final = {"content-type": "text/event-stream"}


class _Stream(httpx.AsyncByteStream):
    """An event stream that stays open until its reader goes."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[bytes] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield await self.said.get()


def _ids(provider_id: str) -> dict[str, str]:
    return {"id": provider_id, "generation_id": provider_id}


def _oxen(event: Event, *, url: str, reason: str) -> dict[str, Any]:
    prediction = event.prediction
    if prediction.output is not None:
        return {"status": "succeeded", url: prediction.output[0].url if prediction.output else None}
    words = prediction.error.message if prediction.error else ""
    return {"status": "failed" if prediction.status == "failed" else "cancelled", reason: words}


def _eachlabs(event: Event) -> dict[str, Any]:
    prediction = event.prediction
    if prediction.output is not None:
        return {"status": "success", "output": _files(prediction.output)}
    error = prediction.error
    code = _HINTS.get(error.code, "") if error else ""
    return {
        "status": "failed" if prediction.status == "failed" else "cancelled",
        "output": "",
        "error": error.message if error else "",
        "error_code": code,
    }


def _files(outputs: list[Output]) -> Any:
    """Return files as objects; words alone stand for themselves."""
    if len(outputs) == 1 and outputs[0].url is None:
        return outputs[0].text
    return [msgspec.to_builtins(output) for output in outputs]


def _eachlabs_callback(provider_id: str, event: Event) -> dict[str, Any]:
    return {"exec_id": provider_id, "flow_id": None, **_eachlabs(event)}


def _fal_callback(provider_id: str, event: Event) -> dict[str, Any]:
    ids = {"request_id": provider_id, "gateway_request_id": provider_id}
    status, payload = _fal(event)
    if status < _FAILED:
        return {**ids, "status": "OK", "payload": payload, "error": None}
    error = f"Invalid status code: {status}"
    return {**ids, "status": "ERROR", "payload": payload, "error": error}


def _fal(event: Event) -> tuple[int, Any]:
    """Return the status and the body of a result."""
    prediction = event.prediction
    if prediction.output is not None:
        files = _files(prediction.output)
        return 200, {"images": files} if isinstance(files, list) else files
    error = prediction.error
    if error is None or error.code == "canceled":
        return _FAILED, {"detail": "client_cancelled", "error_type": "client_cancelled"}
    kind = _HINTS.get(error.code, "unknown")
    return _FAILED, {"detail": [{"loc": ["body"], "msg": error.message, "type": kind}]}


def _fal_polled(taken: Taken, asked: str) -> httpx.Response:
    if asked == "cancel":
        return httpx.Response(202, json={"status": "CANCELLATION_REQUESTED"})
    if asked == "status":
        word = "IN_PROGRESS" if taken.event is None else "COMPLETED"
        return httpx.Response(200, json={"status": word, "request_id": taken.id})
    if taken.event is None:
        return httpx.Response(400, json={"detail": "Request is still in progress"})
    status, body = _fal(taken.event)
    return httpx.Response(status, json=body)


_CALLBACKS: Final[Mapping[str, Callable[[str, Event], dict[str, Any]]]] = {
    "eachlabs": _eachlabs_callback,
    "fal": _fal_callback,
}
