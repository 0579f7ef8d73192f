"""OpenRouter: videos that need the key; callbacks in an envelope, with a timed signature."""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from receiver.emulator import pictures, wire
from receiver.emulator.emulated import CallsBack, is_unknown, picture_names
from receiver.emulator.endings import Failure
from receiver.emulator.ledger import Prediction, State
from receiver.emulator.options import Schedule
from receiver.emulator.wire import answer

REASONS: dict[Failure, str] = {
    "model": "Provider returned error",
    "moderated": "Content policy violation",
    "timeout": "Job exceeded maximum time to live",
    "prompt": "prompt is required",
}
_STATUSES: dict[State, str] = {
    "queued": "pending",
    "running": "in_progress",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}
SECRET = "a signing secret of the workspace"  # noqa: S105 - not a real secret
_PRICE = 0.25
"""Dollars."""


class OpenRouter(CallsBack):
    """Routes under `/openrouter`."""

    name = "openrouter"
    schedule = Schedule(waits=(10, 60), first_timeout=10, later_timeout=10)
    """Undocumented: our guess."""

    @classmethod
    def settings(cls) -> dict[str, str]:
        return super().settings() | {"OPENROUTER_WEBHOOK_SECRET": SECRET}

    def calls(self) -> wire.Calls:
        base = "/openrouter/api/v1"
        one = base + "/videos/{id}"
        return [
            ("submit", "POST", base + "/videos", self._submit),
            ("run", "POST", base + "/images", self._run),
            ("content", "GET", one + "/content", self._content),
            ("poll", "GET", one, self._poll),
            ("key", "GET", base + "/key", self._key),
        ]

    def account(self, request: Request) -> str:
        key = wire.credential(request, "Bearer")
        return self.world.authenticate(key, _refused(401, "User not found."))

    def not_found(self, _request: Request) -> Response:
        return _refused(404, "Job not found")

    async def _submit(self, request: Request, account: str) -> Response:
        prediction = self._read(request, account, await wire.read_object(request) or {})
        job = {"id": prediction.id, "polling_url": _url(prediction), "status": "pending"}
        return await self.accept([prediction], answer(job, 202))

    async def _run(self, request: Request, account: str) -> Response:
        body = await wire.read_object(request) or {}
        prediction = await self.run(self._read(request, account, body))
        if prediction.state != "succeeded":
            return _refused(400, _reason(prediction))
        data = [{"b64_json": each, "media_type": "image/png"} for each in _drawn(prediction)]
        usage = {"completion_tokens": 4175, "total_tokens": 4175, "cost": _PRICE}
        created = int(prediction.submitted_at)
        return answer({"created": created, "data": data, "usage": usage})

    def _read(self, request: Request, account: str, body: dict[str, Any]) -> Prediction:
        model, hook = wire.text_of(body.get("model")), wire.text_of(body.get("callback_url"))
        new = self.prediction(request, account, model, body, callback_url=hook)
        self.check(self._problems(new))
        return new

    def _problems(self, new: Prediction) -> Iterator[Response]:
        if rule := self.refusal(new.prompt):
            yield _refused(rule.status, rule.reason or "Provider unavailable", rule.headers)
        if not new.model or is_unknown(new.model):
            yield _refused(404, f"Model {new.model} not found")
        hook = new.input.get("callback_url", "")
        if not isinstance(hook, str) or (hook and not hook.startswith("http")):
            yield _refused(400, "callback_url: Invalid URL")
        if "[refuse]" in new.prompt:
            yield _refused(402, "Insufficient credits")

    async def _poll(self, request: Request, account: str) -> Response:
        prediction = self.polled(request, account)
        return answer(self._job(prediction) | {"polling_url": _url(prediction)})

    async def _content(self, request: Request, account: str) -> Response:
        """Return a video; here it is a picture."""
        index = request.query_params.get("index", "0")
        names = picture_names(self.find(request, account))
        if not index.isdecimal() or int(index) >= len(names):
            return _refused(404, "No such output")
        return Response(pictures.draw(names[int(index)]), media_type="image/png")

    async def _key(self, _request: Request, _account: str) -> Response:
        return answer({"data": {"label": "sk-or-v1-116...0ce", "limit": None, "usage": 0.1}})

    def _job(self, prediction: Prediction) -> dict[str, Any]:
        """Return the part of a job that a callback and a poll have in common."""
        job: dict[str, Any] = {"id": prediction.id, "status": self._status(prediction)}
        if not prediction.finished:
            return job
        job["generation_id"] = f"gen-{prediction.id}"
        if prediction.state == "succeeded":
            usage = {"cost": _PRICE, "is_byok": False}
            return job | {"unsigned_urls": _urls(prediction), "usage": usage}
        return job | {"error": _reason(prediction)}

    def _status(self, prediction: Prediction) -> str:
        expired = prediction.state == "failed" and prediction.plan.failure == "timeout"
        return "expired" if expired else _STATUSES[prediction.state]

    def content(self, prediction: Prediction) -> dict[str, Any]:
        return {
            "type": f"video.generation.{self._status(prediction)}",
            "created_at": wire.moment(self.world.now()),
            "data": self._job(prediction) | {"model": prediction.model},
        }

    def proof(self, prediction: Prediction, body: bytes, at: float | None) -> dict[str, str]:
        at, forged = self.signing(prediction, at)
        return {
            "x-openrouter-signature": signature(SECRET[::-1] if forged else SECRET, at, body),
            "x-openrouter-idempotency-key": f"{prediction.id}-{self._status(prediction)}",
        }


def signature(secret: str, at: int, body: bytes) -> str:
    """Return the signature of a time and a body, joined by a comma."""
    signed = hmac.digest(secret.encode(), f"{at},".encode() + body, "sha256").hex()
    return f"t={at},v1={signed}"


def _drawn(prediction: Prediction) -> list[str]:
    """Return the pictures of a blocking call in base64."""
    return [pictures.data_uri(name).partition(",")[2] for name in picture_names(prediction)]


def _url(prediction: Prediction) -> str:
    return f"{prediction.origin}/openrouter/api/v1/videos/{prediction.id}"


def _urls(prediction: Prediction) -> Sequence[Any]:
    planned = prediction.plan.ending.output
    if isinstance(planned, str) or (planned is None and "[text]" in prediction.prompt):
        return []
    if planned is not None:
        return planned
    at = _url(prediction)
    return [f"{at}/content?index={n}" for n in range(len(picture_names(prediction)))]


def _refused(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return answer({"error": {"code": status, "message": message}}, status, headers)


def _reason(prediction: Prediction) -> str:
    if prediction.state == "cancelled":
        return "Job was cancelled"
    return prediction.reason(REASONS)
