"""Eachlabs: a submit and a final poll have the status `success`, a callback `succeeded`."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from receiver.emulator import wire
from receiver.emulator.emulated import CallsBack, is_unknown
from receiver.emulator.endings import Failure
from receiver.emulator.ledger import Prediction
from receiver.emulator.options import Schedule
from receiver.emulator.wire import Refusal, answer
from receiver.emulator.world import World

REASONS: dict[Failure, str] = {
    "model": "upstream model returned an error",
    "moderated": "input was flagged by the content moderation system",
    "timeout": "model timed out",
    "prompt": "prompt is required",
}
CATEGORIES: dict[Failure, str] = {
    "model": "provider_error",
    "moderated": "content_moderation",
    "timeout": "execution_timeout",
    "prompt": "invalid_user_input",
}
_MOST_LISTED = 100
_LISTED = 50
_OLDEST = 7
"""In shape `mixed`: the variant, of eight, whose callback has the oldest shape."""


class Eachlabs(CallsBack):
    """Routes under `/eachlabs`."""

    name = "eachlabs"
    schedule = Schedule(waits=(10, 10), first_timeout=30, later_timeout=30)

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._closed_until: dict[str, float] = {}

    def calls(self) -> wire.Calls:
        predictions, webhooks = "/eachlabs/v1/prediction", "/eachlabs/v1/webhooks"
        return [
            ("submit", "POST", predictions, self._submit),
            ("submit", "POST", predictions + "/", self._submit),
            ("run", "POST", predictions + "/run", self._run),
            ("poll", "GET", predictions + "/{id}", self._poll),
            ("cancel", "POST", predictions + "/{id}/cancel", self._cancel),
            ("webhooks", "GET", webhooks, self._webhooks),
            ("model", "GET", "/eachlabs/v1/models/{slug:path}", self._model),
        ]

    def account(self, request: Request) -> str:
        key = request.headers.get("x-api-key") or wire.credential(request, "Bearer")
        refused = self._refused(401, "unauthorized", "a valid API key is required")
        account = self.world.authenticate(key, refused)
        limit = self.world.options.eachlabs_per_minute
        if self.wait_for_rate(key, limit):
            raise Refusal(self._refused(429, "too many requests", f"{limit} a minute"))
        return account

    def not_found(self, _request: Request) -> Response:
        return answer({"error": "Prediction not found"}, 404)

    async def _submit(self, request: Request, account: str) -> Response:
        prediction = await self._read(request, account)
        created = {
            "status": "success",
            "message": "Prediction created successfully",
            "predictionID": prediction.id,
        }
        return await self.accept([prediction], answer(created))

    async def _run(self, request: Request, account: str) -> Response:
        prediction = await self.run(await self._read(request, account))
        failure = prediction.plan.failure
        words = {"succeeded": "success", "failed": "failed", "cancelled": "cancelled"}
        return answer(
            {
                "status": words[prediction.state],
                "output": None if failure else self._output(prediction),
                "error": prediction.reason(REASONS),
            }
        )

    async def _read(self, request: Request, account: str) -> Prediction:
        body = await wire.read_object(request) or {}
        given = body.get("input")
        inputs: dict[str, Any] = given if isinstance(given, dict) else {}
        new = self.prediction(
            request,
            account,
            wire.text_of(body.get("model")),
            inputs,
            callback_url=wire.text_of(body.get("webhook_url")),
            secret=wire.text_of(body.get("webhook_secret")),
        )
        self.check(self._problems(new, body))
        return new

    def _problems(self, new: Prediction, body: Mapping[str, Any]) -> Iterator[Response]:
        if rule := self.refusal(new.prompt):
            reason = rule.reason or "unavailable"
            yield self._refused(rule.status, reason, "try later", rule.headers)
        needed = ("model", "input", "version") if self._is_old_shape else ("model", "input")
        if missing := [name for name in needed if not body.get(name) and body.get(name) != {}]:
            yield self._refused(
                400 if self._is_old_shape else 422, "invalid request", ", ".join(missing)
            )
        if not isinstance(body["model"], str) or not isinstance(body["input"], dict):
            yield self._refused(400, "invalid request", "model is text, input an object")
        if is_unknown(new.model):
            yield self._refused(404, "not found", f"model {new.model} does not exist")
        if "[refuse]" in new.prompt:
            yield self._refused(402, "payment required", "the balance is used up")
        yield from self._full(new.account)
        yield from self._no_money(new)

    def _full(self, account: str) -> Iterator[Response]:
        """Refuse a submit above the concurrency limit, or within `eachlabs_shut` of a refusal."""
        limit, now = self.world.options.eachlabs_in_flight, self.world.now()
        if not self.is_full(account, limit):
            if now >= self._closed_until.get(account, now):
                return
            self.world.ledger.violation("eachlabs", "in_flight", str(limit))
        self._closed_until[account] = now + self.world.options.eachlabs_shut
        few = f"accounts with a balance of $10.00 or less are limited to {limit} concurrent"
        yield self._refused(429, "too many requests", f"{few} executions")

    def _no_money(self, new: Prediction) -> Iterator[Response]:
        """Refuse a submit while another is unfinished, if the fault reserve_money is set."""
        is_alone = not self.world.lifecycle.in_flight["eachlabs", new.account]
        if not is_alone and self.take("reserve_money", new.prompt):
            why = "the estimated cost of your in-flight executions exceeds your current balance"
            yield self._refused(402, "payment required", f"{why} ($1.00)")

    @property
    def _is_old_shape(self) -> bool:
        return self.world.options.shape == "old"

    def _refused(
        self, status: int, error: str, details: str, headers: Mapping[str, str] | None = None
    ) -> Response:
        if self.world.old():
            seed = {"status": "error", "message": error, "details": details}
            return answer(seed, status, headers)
        return answer({"status": status, "error": error, "details": details}, status, headers)

    async def _poll(self, request: Request, account: str) -> Response:
        return answer(self._state(self.polled(request, account)))

    async def _cancel(self, request: Request, account: str) -> Response:
        prediction, canceled = self.canceled(request, account)
        if not canceled:
            return self._refused(409, "conflict", "the prediction has finished")
        if self.take("late_success", prediction.prompt) and prediction.callback_url:
            self.send(prediction, self.callback(replace(prediction, state="succeeded")))
        return answer(
            {
                "status": "success" if prediction.old else "cancelled",
                "message": "Prediction canceled",
                "predictionID": prediction.id,
            }
        )

    def _state(self, prediction: Prediction) -> dict[str, Any]:
        return self._old_state(prediction) if prediction.old else self._new_state(prediction)

    def _new_state(self, prediction: Prediction) -> dict[str, Any]:
        url = f"{prediction.origin}/eachlabs/v1/prediction/{prediction.id}"
        return {
            "id": prediction.id,
            "input": prediction.input,
            "status": self._status(prediction),
            "output": self._polled_output(prediction),
            "logs": "",
            "metrics": {"predict_time": prediction.ran, "cost": prediction.cost},
            "urls": {"cancel": url + "/cancel", "get": url},
        }

    def _old_state(self, prediction: Prediction) -> dict[str, Any]:
        state: dict[str, Any] = {"predictionID": prediction.id}
        if not prediction.finished:
            return state | {"status": "processing", "message": "Prediction is still processing"}
        failure = prediction.plan.failure if prediction.state == "failed" else None
        return state | {
            "status": self._status(prediction),
            "output": self._output(prediction) if prediction.state == "succeeded" else "",
            "metrics": {"predict_time": prediction.ran},
            **({"error": prediction.reason(REASONS)} if failure else {}),
        }

    def _status(self, prediction: Prediction) -> str:
        """Return the status in a poll; one page of their documentation has `failed` for `error`."""
        if prediction.state == "failed":
            other = self.world.options.shape == "mixed" and prediction.variant % 2
            return "failed" if other else "error"
        first = "created" if prediction.polls <= 1 else "starting"
        words = {"queued": first, "running": "processing", "succeeded": "success"}
        return words.get(prediction.state, "cancelled")

    def _polled_output(self, prediction: Prediction) -> Any:
        if prediction.state == "failed" and prediction.plan.failure:
            return _envelope(prediction, prediction.plan.failure)
        return self._output(prediction) if prediction.state == "succeeded" else None

    def _output(self, prediction: Prediction) -> Any:
        """Return the pictures as text, list or object, as the models differ."""
        planned = prediction.plan.ending.output
        if planned is not None:
            return planned
        if "[text]" in prediction.prompt:
            return "Output URL"
        urls = self.drawn(prediction)
        if len(urls) > 1:
            return urls
        forms: dict[str, Any] = {"text": urls[0], "list": urls, "object": {"url": urls[0]}}
        return forms[self._form(prediction)]

    def _form(self, prediction: Prediction) -> str:
        if self.world.options.shape == "mixed":
            return ("text", "list", "object")[prediction.variant % 3]
        return "text" if prediction.old else "object"

    def proof(self, prediction: Prediction, _body: bytes, _at: float | None) -> dict[str, str]:
        secret = prediction.secret and self.secret_of(prediction)
        return {"x-webhook-secret": secret} if secret else {}

    def content(self, prediction: Prediction) -> dict[str, Any]:
        if self.world.options.shape == "mixed" and prediction.variant % 8 == _OLDEST:
            return self._oldest_callback(prediction)
        failure, reason = prediction.plan.failure, prediction.reason(REASONS)
        body = {
            "exec_id": prediction.id,
            "flow_id": "" if prediction.old else None,
            "status": prediction.state,
        }
        if failure is None:
            return body | {"output": self._output(prediction), "error": ""}
        if prediction.old:
            return body | {"output": "", "error": reason}
        entry: dict[str, Any] = {"id": "", "status": "", "output": "", "error": reason}
        if prediction.plan.ending.reason:  # any text: only the category classifies it
            entry["classification"] = {"category": CATEGORIES[failure]}
        return body | {"output": [entry], "error": ""}

    def _oldest_callback(self, prediction: Prediction) -> dict[str, Any]:
        failure, reason = prediction.plan.failure, prediction.reason(REASONS)
        return {
            "id": prediction.id,
            "status": "failed" if failure else "success",
            "output": {"error": reason} if failure else self._output(prediction),
            "input": prediction.input,
            "metrics": {"predict_time": prediction.ran},
        }

    async def _webhooks(self, request: Request, account: str) -> Response:
        """List the predictions with at least one callback attempt."""
        limit = min(_number(request, "limit", _LISTED), _MOST_LISTED)
        offset = _number(request, "offset", 0)
        latest = self.world.ledger.latest("eachlabs", account)
        called = (one for one in latest if one.callback_url and one.callback_attempts)
        rows = [self._delivery(one) for one in islice(called, offset, offset + limit)]
        return answer({"webhooks": rows, "limit": limit, "offset": offset})

    async def _model(self, request: Request, _account: str) -> Response:
        slug = request.path_params["slug"]
        if is_unknown(slug):
            return answer({"error": "Failed to fetch model: model not found"}, 404)
        return answer(
            {
                "title": slug.replace("-", " ").title(),
                "slug": slug,
                "version": "0.0.1",
                "output_type": "array",
                "request_schema": _SCHEMA,
                "cost": _COST,
            }
        )

    def _delivery(self, prediction: Prediction) -> dict[str, Any]:
        ended = prediction.state in {"succeeded", "failed"}
        return {
            "execution_id": prediction.id,
            "url": prediction.callback_url,
            "request": self.callback(prediction).decode() if ended else None,
            "headers": {"content-type": "application/json"},
            "source": "prediction",
            "created_at": wire.moment(prediction.submitted_at),
        }


_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["prompt"],
    "properties": {"prompt": {"type": "string"}, "num_images": {"type": "string"}},
}
_COST: dict[str, Any] = {
    "currency": "USD",
    "type": "fixed",
    "amount": 0.039,
    "unit": "execution",
    "estimate": "$0.039 per execution",
    "description": "Pricing is an estimate and may change as rates are updated.",
    "min": None,
    "max": None,
    "depends_on": [],
    "rows": [],
}


def _envelope(prediction: Prediction, failure: Failure) -> dict[str, Any]:
    return {
        "status": "ERROR",
        "success": False,
        "execution_id": prediction.id,
        "model_slug": prediction.model,
        "provider": "emulator",
        "error": prediction.reason(REASONS),
        "error_code": CATEGORIES[failure].upper(),
        "error_message": prediction.reason(REASONS),
        "classification": {"category": CATEGORIES[failure]},
        "retryable": failure in {"model", "timeout"},
        "error_step": "predict",
    }


def _number(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, "")
    return int(text) if text.isdecimal() else default
