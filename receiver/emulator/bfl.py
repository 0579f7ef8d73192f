"""Black Forest Labs: a prediction is polled at its shard; any other answers 404."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from receiver.emulator import wire
from receiver.emulator.emulated import CallsBack, is_unknown
from receiver.emulator.endings import Failure
from receiver.emulator.ledger import Prediction
from receiver.emulator.options import Schedule
from receiver.emulator.wire import answer

ERRORS: dict[Failure, tuple[str, str]] = {
    "model": ("internal_error", "the worker could not make a picture"),
    "moderated": ("content_policy_violation", "the prompt was refused"),
    "timeout": ("generation_timeout", "the generation took too long"),
    "prompt": ("validation_error", "field required"),
}
_SHARD = "/bfl/eu2/v1/get_result"
_CENTS = 4.5
_CREDITS = 1000.0


class Bfl(CallsBack):
    """Routes under `/bfl`."""

    name = "bfl"
    schedule = Schedule(waits=(1, 5, 30), first_timeout=30, later_timeout=30)

    def calls(self) -> wire.Calls:
        return [
            ("poll", "GET", _SHARD, self._poll),
            ("poll", "GET", "/bfl/v1/get_result", self._poll_elsewhere),
            ("credits", "GET", "/bfl/v1/credits", self._credits),
            ("submit", "POST", "/bfl/v1/{model}", self._submit),
        ]

    def account(self, request: Request) -> str:
        refused = answer({"detail": "Not authenticated - Invalid Authentication"}, 403)
        return self.world.authenticate(request.headers.get("x-key", ""), refused)

    def id_in(self, request: Request) -> str:
        return request.query_params.get("id", "")

    def not_found(self, request: Request) -> Response:
        name = self.id_in(request)
        return answer({"id": name, "status": "Task not found", "result": None}, 404)

    async def _submit(self, request: Request, account: str) -> Response:
        prediction = self._read(request, account, await wire.read_object(request))
        created: dict[str, Any] = {"id": prediction.id}
        if prediction.old:  # the older shape has no polling URL and no price
            created |= {"status": "Pending", "webhook_url": prediction.callback_url}
        else:
            url = f"{prediction.origin}{_SHARD}?id={prediction.id}"
            created |= {"polling_url": url, "cost": _CENTS, "input_mp": 0.0, "output_mp": 1.05}
        return await self.accept([prediction], answer(created))

    def _read(self, request: Request, account: str, body: dict[str, Any] | None) -> Prediction:
        fields, model = body or {}, request.path_params["model"]
        hook, secret = (wire.text_of(fields.get(f"webhook_{part}")) for part in ("url", "secret"))
        inputs = {name: fields[name] for name in fields if not name.startswith("webhook_")}
        new = self.prediction(request, account, model, inputs, callback_url=hook, secret=secret)
        self.check(self._problems(new, body))
        return new

    def _problems(self, new: Prediction, body: dict[str, Any] | None) -> Iterator[Response]:
        if rule := self.refusal(new.prompt):
            yield _refused(rule.status, "unavailable", rule.reason, rule.retry_after)
        if is_unknown(new.model):
            yield answer({"detail": "Not Found"}, 404)
        if body is None:
            yield _refused(400, "validation_error", "the body is no JSON object")
        elif not wire.text_of(body.get("webhook_url", "http")).startswith("http"):
            yield _refused(400, "validation_error", "webhook_url is no URL")
        if "[refuse]" in new.prompt:
            yield _refused(402, "insufficient_credits", "the balance is used up")
        limit = self.world.options.bfl_in_flight
        if self.is_full(new.account, limit):
            yield _refused(429, "rate_limit_exceeded", f"{limit} tasks are active", 1)
        if new.plan.failure == "prompt":
            missing = {"loc": ["body", "prompt"], "msg": "field required", "type": "missing"}
            yield answer({"detail": [missing]}, 422)

    async def _poll(self, request: Request, account: str) -> Response:
        return answer(self._state(self.polled(request, account)))

    async def _poll_elsewhere(self, request: Request, account: str) -> Response:
        """Answer a poll outside the shard: 404, unless the submit returned no polling URL."""
        found = self.find(request, account)
        return await self._poll(request, account) if found.old else self.not_found(request)

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
        output = prediction.plan.ending.output
        if output is None:
            output = tuple({"url": url} for url in self.drawn(prediction))
        result: dict[str, Any] = {"prompt": prediction.prompt, "seed": prediction.variant}
        if isinstance(output, str):
            return result | {"sample": output}
        if len(output) == 1 and set(output[0]) == {"url"}:
            return result | {"sample": output[0]["url"]}
        return result | {"samples": output}

    def content(self, prediction: Prediction) -> dict[str, Any]:
        body: dict[str, Any] = {"id": prediction.id, "timestamp": wire.moment(self.world.now())}
        failure = prediction.plan.failure
        if failure is None:
            return body | {"status": "Ready", "result": self._result(prediction)}
        code, words = _error(prediction, failure)
        return body | {"status": "Error", "error": code, "message": words}

    def proof(self, prediction: Prediction, body: bytes, _at: float | None) -> dict[str, str]:
        if not prediction.secret:
            return {}
        digest = hmac.digest(self.secret_of(prediction).encode(), body, "sha256").hex()
        return {"x-bfl-signature": f"sha256={digest}"}


def _error(prediction: Prediction, failure: Failure) -> tuple[str, str]:
    code, usual = ERRORS[failure]
    return code, prediction.plan.ending.reason or usual


def _refused(status: int, error: str, message: str, retry_after: int | None = None) -> Response:
    """Return an error, with the seconds to wait in a field."""
    wait = {} if retry_after is None else {"retry_after": retry_after}
    return answer({"error": error, "message": message or error, **wait}, status)
