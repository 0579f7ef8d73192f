"""WaveSpeed: answers have an envelope, callbacks do not; their signature has its own format."""

from __future__ import annotations

import hmac
import random
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from receiver.emulator import wire
from receiver.emulator.endings import Failure
from receiver.emulator.ledger import Prediction, State
from receiver.emulator.options import Schedule
from receiver.emulator.wire import Refusal, answer
from receiver.emulator.world import NO_SUCH_MODEL, TEXT_ONLY, World, broken_response, output_of

REASONS: dict[Failure, str] = {
    "model": "upstream error: HTTP 500",
    "moderated": "Content flagged as potentially sensitive. Please try different prompts",
    "timeout": "the task timed out",
    "prompt": 'property "prompt" is missing',
    "parameter": "unknown property",
}
_STATUSES: dict[State, str] = {
    "queued": "created",
    "running": "processing",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}
_CALLBACKS = Schedule(waits=(10, 60), first_timeout=10, later_timeout=10)
"""Undocumented: our guess."""


class WaveSpeed:
    """Routes under `/wavespeed`."""

    settings: ClassVar[Mapping[str, str]] = {"WAVESPEED_BASE_URL": "/wavespeed"}

    def __init__(self, world: World) -> None:
        self._world = world
        self._secret = _new(world.rng)
        self._wrong = _new(world.rng)
        world.send_callbacks("wavespeed", self.callback, self.headers, _CALLBACKS)
        world.faults.at_once("rotate_keys", self._rotate)

    def _rotate(self) -> None:
        self._secret = _new(self._world.rng)

    def routes(self) -> list[BaseRoute]:
        base = "/wavespeed/api/v3"
        one = base + "/predictions/{id}"
        calls: wire.Calls = [
            ("poll", "GET", one + "/result", self._poll),
            ("poll", "GET", one, self._poll),
            ("keys", "GET", base + "/webhook/secret", self._webhook_secret),
            ("balance", "GET", base + "/account/balance", self._balance),
            ("submit", "POST", base + "/{model:path}", self._submit),
        ]
        return wire.routes("wavespeed", self._account, calls)

    def _account(self, request: Request) -> str:
        key = wire.credential(request, "Bearer")
        return self._world.authenticate(key, _coded(401, "invalid authentication"))

    async def _submit(self, request: Request, account: str) -> Response:
        inputs = await wire.read_object(request)
        prediction = self._read(request, account, inputs)
        if prediction.input.get("enable_sync_mode") is True:
            return _wrapped(self._task(await self._world.run(prediction)))
        return await self._world.accept([prediction], _wrapped(self._task(prediction)))

    def _read(self, request: Request, account: str, inputs: dict[str, Any] | None) -> Prediction:
        model, prompt = request.path_params["model"], wire.text_of((inputs or {}).get("prompt"))
        hook = request.query_params.get("webhook", "")
        problem = self._problem(model, inputs, prompt, hook)
        if problem is None:
            prediction = self._world.prediction(
                "wavespeed", request, account, model, inputs or {}, callback_url=hook
            )
            if prediction.plan.failure != "prompt":
                return prediction
            problem = self._refused(400, REASONS["prompt"])
        raise self._world.rejected("wavespeed", problem)

    def _problem(
        self, model: str, inputs: dict[str, Any] | None, prompt: str, hook: str
    ) -> Response | None:
        if rule := self._world.refusal("wavespeed", prompt):
            return _coded(rule.status, rule.reason or "service unavailable", rule.headers)
        if {NO_SUCH_MODEL, TEXT_ONLY} & set(model.split("/")):
            return self._refused(404, f"product not found: {model}")
        if inputs is None:
            return self._refused(400, "the body is no JSON object")
        if hook and not hook.startswith("http"):
            return self._refused(400, "webhook is no URL")
        if "[refuse]" in prompt:
            return self._refused(402, "Insufficient credits. Please top up.")
        return None

    def _refused(self, status: int, message: str) -> Response:
        """Return a refusal by HTTP status or, in the older shape, by a code under status 200."""
        if self._world.old():
            return answer({"code": status, "message": message}, 200)
        return _coded(status, message)

    async def _poll(self, request: Request, account: str) -> Response:
        found = self._world.find_polled("wavespeed", request.path_params["id"], account)
        if found is None:
            raise Refusal(self._refused(404, "prediction not found"))
        return _wrapped(self._task(found))

    async def _webhook_secret(self, _request: Request, _account: str) -> Response:
        if rule := self._world.faults.take("break_jwks", "wavespeed"):
            return broken_response(rule)
        return _wrapped({"secret": self._secret})

    async def _balance(self, _request: Request, _account: str) -> Response:
        return _wrapped({"balance": 9.5, "currency": "USD"})

    def _task(self, prediction: Prediction) -> dict[str, Any]:
        """Return a task in the form of all channels."""
        url = f"{prediction.origin}/wavespeed/api/v3/predictions/{prediction.id}"
        outputs = self._outputs(prediction)
        failure = prediction.plan.failure if prediction.state == "failed" else None
        return {
            "id": prediction.id,
            "model": prediction.model,
            "outputs": outputs,
            "urls": {"get": url if prediction.old else url + "/result"},
            "has_nsfw_contents": [True] if failure == "moderated" else [False] * len(outputs),
            "status": _STATUSES[prediction.state],
            "created_at": wire.moment(prediction.submitted_at),
            "error": prediction.reason(REASONS),
            "timings": {"inference": _took(prediction)},
        }

    def _outputs(self, prediction: Prediction) -> list[Any]:
        if prediction.state != "succeeded":
            return []
        planned = prediction.plan.ending.output
        if planned is None and "[text]" in prediction.prompt:
            return ["the model answered in words"]
        output = output_of(self._world, prediction)
        if isinstance(output, str):
            return [output]
        return output if planned is not None else [file["url"] for file in output]

    def callback(self, prediction: Prediction) -> bytes:
        """Return the bare task, with its input."""
        return msgspec.json.encode(self._task(prediction) | {"input": prediction.input})

    def headers(
        self, prediction: Prediction, body: bytes, at: float | None = None
    ) -> dict[str, str]:
        """Return the headers that sign a body, with the current time or `at`."""
        at, forged = self._world.signing(prediction, at)
        secret = self._wrong if forged else self._secret
        message_id = f"wh_{prediction.id}"
        return {
            "content-type": "application/json",
            "user-agent": "wavespeed-emulator",
            "webhook-id": message_id,
            "webhook-timestamp": str(at),
            "webhook-signature": signature(secret, message_id, at, body),
        }


def signature(secret: str, message_id: str, at: int, body: bytes) -> str:
    """Return the signature in hex; its key is the text of the secret after the prefix."""
    key = secret.removeprefix("whsec_").encode()
    signed = f"{message_id}.{at}.".encode() + body
    return "v3," + hmac.digest(key, signed, "sha256").hex()


def _new(rng: random.Random) -> str:
    return "whsec_" + rng.randbytes(24).hex()


def _wrapped(data: Any) -> Response:
    return answer({"code": 200, "message": "success", "data": data})


def _coded(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return answer({"code": status, "message": message}, status, headers)


def _took(prediction: Prediction) -> int:
    """Return the running time in milliseconds."""
    if prediction.started_at is None or prediction.completed_at is None:
        return 0
    return round((prediction.completed_at - prediction.started_at) * 1000)
