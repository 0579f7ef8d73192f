"""Black Forest Labs: a prediction is polled at its shard; any other answers 404."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from receiver.emulator import wire
from receiver.emulator.endings import Failure
from receiver.emulator.ledger import Prediction
from receiver.emulator.options import Schedule
from receiver.emulator.wire import answer
from receiver.emulator.world import NO_SUCH_MODEL, TEXT_ONLY, World, output_of

ERRORS: dict[Failure, tuple[str, str]] = {
    "model": ("internal_error", "the worker could not make a picture"),
    "moderated": ("content_policy_violation", "the prompt was refused"),
    "timeout": ("generation_timeout", "the generation took too long"),
    "prompt": ("validation_error", "field required"),
    "parameter": ("validation_error", "extra field"),
}
_CALLBACKS = Schedule(waits=(1, 5, 30), first_timeout=30, later_timeout=30)
_SHARD = "/bfl/eu2/v1/get_result"
_CENTS = 4.5
_CREDITS = 1000.0


class Bfl:
    """Routes under `/bfl`."""

    settings: ClassVar[Mapping[str, str]] = {"BFL_BASE_URL": "/bfl"}

    def __init__(self, world: World) -> None:
        self._world = world
        world.send_callbacks("bfl", self.callback, self.headers, _CALLBACKS)

    def routes(self) -> list[BaseRoute]:
        calls: wire.Calls = [
            ("poll", "GET", _SHARD, self._poll),
            ("poll", "GET", "/bfl/v1/get_result", self._poll_elsewhere),
            ("credits", "GET", "/bfl/v1/credits", self._credits),
            ("submit", "POST", "/bfl/v1/{model}", self._submit),
        ]
        return wire.routes("bfl", self._account, calls)

    def _account(self, request: Request) -> str:
        refused = answer({"detail": "Not authenticated - Invalid Authentication"}, 403)
        return self._world.authenticate(request.headers.get("x-key", ""), refused)

    async def _submit(self, request: Request, account: str) -> Response:
        prediction = self._read(request, account, await wire.read_object(request))
        created: dict[str, Any] = {"id": prediction.id}
        if prediction.old:  # the older shape has no polling URL and no price
            created |= {"status": "Pending", "webhook_url": prediction.callback_url}
        else:
            url = f"{prediction.origin}{_SHARD}?id={prediction.id}"
            created |= {"polling_url": url, "cost": _CENTS, "input_mp": 0.0, "output_mp": 1.05}
        return await self._world.accept([prediction], answer(created))

    def _read(self, request: Request, account: str, body: dict[str, Any] | None) -> Prediction:
        fields = body or {}
        model = request.path_params["model"]
        problem = self._problem(model, body, wire.text_of(fields.get("prompt")))
        limit = self._world.options.bfl_in_flight
        if problem is None and self._world.is_full("bfl", account, limit):
            problem = _refused(429, "rate_limit_exceeded", f"{limit} tasks are active", 1)
        if problem:
            raise self._world.rejected("bfl", problem)
        hook, secret = (wire.text_of(fields.get(f"webhook_{part}")) for part in ("url", "secret"))
        inputs = {name: fields[name] for name in fields if not name.startswith("webhook_")}
        prediction = self._world.prediction(
            "bfl", request, account, model, inputs, callback_url=hook, secret=secret
        )
        if prediction.plan.failure == "prompt":
            missing = {"loc": ["body", "prompt"], "msg": "field required", "type": "missing"}
            raise self._world.rejected("bfl", answer({"detail": [missing]}, 422))
        return prediction

    def _problem(self, model: str, body: dict[str, Any] | None, prompt: str) -> Response | None:
        if rule := self._world.refusal("bfl", prompt):
            return _refused(rule.status, "unavailable", rule.reason, rule.retry_after)
        if model in {NO_SUCH_MODEL, TEXT_ONLY}:
            return answer({"detail": "Not Found"}, 404)
        if body is None:
            return _refused(400, "validation_error", "the body is no JSON object")
        if not wire.text_of(body.get("webhook_url", "http")).startswith("http"):
            return _refused(400, "validation_error", "webhook_url is no URL")
        if "[refuse]" in prompt:
            return _refused(402, "insufficient_credits", "the balance is used up")
        return None

    async def _poll(self, request: Request, account: str) -> Response:
        name = request.query_params.get("id", "")
        prediction = self._world.find_polled("bfl", name, account)
        if prediction is None:
            return _not_found(name)
        return answer(self._state(prediction))

    async def _poll_elsewhere(self, request: Request, account: str) -> Response:
        """Answer a poll outside the shard: 404, unless the submit returned no polling URL."""
        name = request.query_params.get("id", "")
        found = self._world.ledger.find("bfl", name, account)
        return await self._poll(request, account) if found and found.old else _not_found(name)

    async def _credits(self, _request: Request, _account: str) -> Response:
        return answer({"credits": _CREDITS})

    def _state(self, prediction: Prediction) -> dict[str, Any]:
        state: dict[str, Any] = {"id": prediction.id, "status": "Pending", "result": None}
        if not prediction.finished:
            return state
        failure = prediction.plan.failure
        if failure is None:
            return state | {"status": "Ready", "result": self._result(prediction)}
        if failure == "moderated" and not prediction.plan.ending.reason:
            where = "Content" if prediction.variant % 2 else "Request"
            return state | {"status": f"{where} Moderated"}
        code, words = _error(prediction, failure)
        return state | {"status": "Error", "details": {"error": words, "code": code}}

    def _result(self, prediction: Prediction) -> dict[str, Any]:
        """Return one picture, or several if the ending has them."""
        output = output_of(self._world, prediction)
        result: dict[str, Any] = {"prompt": prediction.prompt, "seed": prediction.variant}
        if isinstance(output, str):
            return result | {"sample": output}
        if len(output) == 1 and set(output[0]) == {"url"}:
            return result | {"sample": output[0]["url"]}
        return result | {"samples": output}

    def callback(self, prediction: Prediction) -> bytes:
        body: dict[str, Any] = {"id": prediction.id, "timestamp": wire.moment(self._world.now())}
        failure = prediction.plan.failure
        if failure is None:
            body |= {"status": "Ready", "result": self._result(prediction)}
        else:
            code, words = _error(prediction, failure)
            body |= {"status": "Error", "error": code, "message": words}
        return msgspec.json.encode(body)

    def headers(
        self,
        prediction: Prediction,
        body: bytes,
        at: float | None = None,  # noqa: ARG002 - nothing contains a time
    ) -> dict[str, str]:
        headers = {"content-type": "application/json", "user-agent": "bfl-emulator"}
        if not prediction.secret:
            return headers
        wrong = self._world.faults.take("wrong_signature", "bfl", prediction.prompt)
        secret = prediction.secret[::-1] if wrong else prediction.secret
        digest = hmac.digest(secret.encode(), body, "sha256").hex()
        return headers | {"x-bfl-signature": f"sha256={digest}"}


def _error(prediction: Prediction, failure: Failure) -> tuple[str, str]:
    code, usual = ERRORS[failure]
    return code, prediction.plan.ending.reason or usual


def _not_found(name: str) -> Response:
    return answer({"id": name, "status": "Task not found", "result": None}, 404)


def _refused(status: int, error: str, message: str, retry_after: int | None = None) -> Response:
    """Return an error, with the seconds to wait in a field."""
    wait = {} if retry_after is None else {"retry_after": retry_after}
    return answer({"error": error, "message": message or error, **wait}, status)
