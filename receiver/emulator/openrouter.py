"""OpenRouter: videos that need the key; callbacks in an envelope, with a timed signature."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from receiver.emulator import pictures, wire
from receiver.emulator.endings import Failure
from receiver.emulator.ledger import Prediction, State
from receiver.emulator.options import Schedule
from receiver.emulator.wire import Refusal, answer
from receiver.emulator.world import NO_SUCH_MODEL, TEXT_ONLY, World, output_of, picture_names

REASONS: dict[Failure, str] = {
    "model": "Provider returned error",
    "moderated": "Content policy violation",
    "timeout": "Job exceeded maximum time to live",
    "prompt": "prompt is required",
    "parameter": "Unrecognized key",
}
_STATUSES: dict[State, str] = {
    "queued": "pending",
    "running": "in_progress",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}
SECRET = "a signing secret of the workspace"  # noqa: S105 - not a real secret
_CALLBACKS = Schedule(waits=(10, 60), first_timeout=10, later_timeout=10)
"""Undocumented: our guess."""
_PRICE = 0.25
"""Dollars."""


class OpenRouter:
    """Routes under `/openrouter`."""

    settings: ClassVar[Mapping[str, str]] = {
        "OPENROUTER_BASE_URL": "/openrouter",
        "OPENROUTER_WEBHOOK_SECRET": SECRET,
    }

    def __init__(self, world: World) -> None:
        self._world = world
        world.send_callbacks("openrouter", self.callback, self.headers, _CALLBACKS)

    def routes(self) -> list[BaseRoute]:
        base = "/openrouter/api/v1"
        one = base + "/videos/{id}"
        calls: wire.Calls = [
            ("submit", "POST", base + "/videos", self._submit),
            ("run", "POST", base + "/images", self._run),
            ("content", "GET", one + "/content", self._content),
            ("poll", "GET", one, self._poll),
            ("key", "GET", base + "/key", self._key),
        ]
        return wire.routes("openrouter", self._account, calls)

    def _account(self, request: Request) -> str:
        key = wire.credential(request, "Bearer")
        return self._world.authenticate(key, _refused(401, "User not found."))

    async def _submit(self, request: Request, account: str) -> Response:
        prediction = self._read(request, account, await wire.read_object(request) or {})
        job = {"id": prediction.id, "polling_url": _url(prediction), "status": "pending"}
        return await self._world.accept([prediction], answer(job, 202))

    async def _run(self, request: Request, account: str) -> Response:
        body = await wire.read_object(request) or {}
        prediction = await self._world.run(self._read(request, account, body))
        if prediction.state != "succeeded":
            return _refused(400, _reason(prediction))
        data = [{"b64_json": each, "media_type": "image/png"} for each in _drawn(prediction)]
        usage = {"completion_tokens": 4175, "total_tokens": 4175, "cost": _PRICE}
        created = int(prediction.submitted_at)
        return answer({"created": created, "data": data, "usage": usage})

    def _read(self, request: Request, account: str, body: dict[str, Any]) -> Prediction:
        model, hook = wire.text_of(body.get("model")), body.get("callback_url", "")
        problem = self._problem(model, wire.text_of(body.get("prompt")), hook)
        if problem is not None:
            raise self._world.rejected("openrouter", problem)
        return self._world.prediction(
            "openrouter", request, account, model, body, callback_url=hook
        )

    def _problem(self, model: str, prompt: str, hook: Any) -> Response | None:
        if rule := self._world.refusal("openrouter", prompt):
            return _refused(rule.status, rule.reason or "Provider unavailable", rule.headers)
        if not model or {NO_SUCH_MODEL, TEXT_ONLY} & set(model.split("/")):
            return _refused(404, f"Model {model} not found")
        if not isinstance(hook, str) or (hook and not hook.startswith("http")):
            return _refused(400, "callback_url: Invalid URL")
        if "[refuse]" in prompt:
            return _refused(402, "Insufficient credits")
        return None

    async def _poll(self, request: Request, account: str) -> Response:
        found = self._world.find_polled("openrouter", request.path_params["id"], account)
        return answer(self._job(_present(found)) | {"polling_url": _url(_present(found))})

    async def _content(self, request: Request, account: str) -> Response:
        """Return a video; here it is a picture."""
        found = self._world.ledger.find("openrouter", request.path_params["id"], account)
        index = request.query_params.get("index", "0")
        names = picture_names(_present(found))
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
            return job | {"unsigned_urls": self._urls(prediction), "usage": usage}
        return job | {"error": _reason(prediction)}

    def _status(self, prediction: Prediction) -> str:
        expired = prediction.state == "failed" and prediction.plan.failure == "timeout"
        return "expired" if expired else _STATUSES[prediction.state]

    def _urls(self, prediction: Prediction) -> list[Any]:
        if prediction.plan.ending.output is not None:
            planned = output_of(self._world, prediction)
            return [] if isinstance(planned, str) else planned
        if "[text]" in prediction.prompt:
            return []
        at = _url(prediction)
        return [f"{at}/content?index={n}" for n in range(len(picture_names(prediction)))]

    def callback(self, prediction: Prediction) -> bytes:
        event = {
            "type": f"video.generation.{self._status(prediction)}",
            "created_at": wire.moment(self._world.now()),
            "data": self._job(prediction) | {"model": prediction.model},
        }
        return msgspec.json.encode(event)

    def headers(
        self, prediction: Prediction, body: bytes, at: float | None = None
    ) -> dict[str, str]:
        """Return the headers that sign a body, with the current time or `at`."""
        at, forged = self._world.signing(prediction, at)
        return {
            "content-type": "application/json",
            "user-agent": "openrouter-emulator",
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


def _present(prediction: Prediction | None) -> Prediction:
    if prediction is None:
        raise Refusal(_refused(404, "Job not found"))
    return prediction


def _refused(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return answer({"error": {"code": status, "message": message}}, status, headers)


def _reason(prediction: Prediction) -> str:
    if prediction.state == "cancelled":
        return "Job was cancelled"
    return prediction.reason(REASONS)
