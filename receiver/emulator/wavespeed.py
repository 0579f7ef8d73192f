"""WaveSpeed: answers have an envelope, callbacks do not; their signature has its own format."""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from receiver.emulator import wire
from receiver.emulator.emulated import CallsBack, is_unknown
from receiver.emulator.endings import Failure
from receiver.emulator.ledger import Prediction, State
from receiver.emulator.options import Schedule
from receiver.emulator.secrets import AccountSecret
from receiver.emulator.wire import answer
from receiver.emulator.world import World

REASONS: dict[Failure, str] = {
    "model": "upstream error: HTTP 500",
    "moderated": "Content flagged as potentially sensitive. Please try different prompts",
    "timeout": "the task timed out",
    "prompt": 'property "prompt" is missing',
}
_STATUSES: dict[State, str] = {
    "queued": "created",
    "running": "processing",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}


class WaveSpeed(CallsBack):
    """Routes under `/wavespeed`."""

    name = "wavespeed"
    schedule = Schedule(waits=(10, 60), first_timeout=10, later_timeout=10)
    """Undocumented: our guess."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._secret = AccountSecret(world.rng, signature)
        world.faults.at_once("rotate_keys", self._secret.rotate)

    def calls(self) -> wire.Calls:
        base = "/wavespeed/api/v3"
        one = base + "/predictions/{id}"
        return [
            ("poll", "GET", one + "/result", self._poll),
            ("poll", "GET", one, self._poll),
            ("keys", "GET", base + "/webhook/secret", self._webhook_secret),
            ("balance", "GET", base + "/account/balance", self._balance),
            ("submit", "POST", base + "/{model:path}", self._submit),
        ]

    def account(self, request: Request) -> str:
        key = wire.credential(request, "Bearer")
        return self.world.authenticate(key, _coded(401, "invalid authentication"))

    def not_found(self, _request: Request) -> Response:
        return self._refused(404, "prediction not found")

    async def _submit(self, request: Request, account: str) -> Response:
        inputs = await wire.read_object(request)
        prediction = self._read(request, account, inputs)
        if prediction.input.get("enable_sync_mode") is True:
            return _wrapped(self._task(await self.run(prediction)))
        return await self.accept([prediction], _wrapped(self._task(prediction)))

    def _read(self, request: Request, account: str, inputs: dict[str, Any] | None) -> Prediction:
        model, hook = request.path_params["model"], request.query_params.get("webhook", "")
        new = self.prediction(request, account, model, inputs, callback_url=hook)
        self.check(self._problems(new, inputs))
        return new

    def _problems(self, new: Prediction, inputs: dict[str, Any] | None) -> Iterator[Response]:
        if rule := self.refusal(new.prompt):
            yield _coded(rule.status, rule.reason or "service unavailable", rule.headers)
        if is_unknown(new.model):
            yield self._refused(404, f"product not found: {new.model}")
        if inputs is None:
            yield self._refused(400, "the body is no JSON object")
        if new.callback_url and not new.callback_url.startswith("http"):
            yield self._refused(400, "webhook is no URL")
        if "[refuse]" in new.prompt:
            yield self._refused(402, "Insufficient credits. Please top up.")
        if new.plan.failure == "prompt":
            yield self._refused(400, REASONS["prompt"])

    def _refused(self, status: int, message: str) -> Response:
        """Return a refusal by HTTP status or, in the older shape, by a code under status 200."""
        if self.world.old():
            return answer({"code": status, "message": message}, 200)
        return _coded(status, message)

    async def _poll(self, request: Request, account: str) -> Response:
        return _wrapped(self._task(self.polled(request, account)))

    async def _webhook_secret(self, _request: Request, _account: str) -> Response:
        return self.hand_out(_envelope({"secret": self._secret.shown}))

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
            "timings": {"inference": round(prediction.ran * 1000)},
        }

    def _outputs(self, prediction: Prediction) -> Sequence[Any]:
        if prediction.state != "succeeded":
            return []
        planned = prediction.plan.ending.output
        if planned is not None:
            return [planned] if isinstance(planned, str) else planned
        if "[text]" in prediction.prompt:
            return ["the model answered in words"]
        return self.drawn(prediction)

    def content(self, prediction: Prediction) -> dict[str, Any]:
        """Return the bare task, with its input."""
        return self._task(prediction) | {"input": prediction.input}

    def proof(self, prediction: Prediction, body: bytes, at: float | None) -> dict[str, str]:
        at, forged = self.signing(prediction, at)
        return self._secret.headers(f"wh_{prediction.id}", at, body, forged=forged)


def signature(secret: str, message_id: str, at: int, body: bytes) -> str:
    """Return the signature in hex; its key is the text of the secret after the prefix."""
    key = secret.removeprefix("whsec_").encode()
    signed = f"{message_id}.{at}.".encode() + body
    return "v3," + hmac.digest(key, signed, "sha256").hex()


def _envelope(data: Any) -> dict[str, Any]:
    return {"code": 200, "message": "success", "data": data}


def _wrapped(data: Any) -> Response:
    return answer(_envelope(data))


def _coded(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return answer({"code": status, "message": message}, status, headers)
