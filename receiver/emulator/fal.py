"""fal.ai: COMPLETED may be a failure, unfinished is HTTP 202, every callback is signed."""

import json
import re
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.emulator import wire
from receiver.emulator.emulated import CallsBack, is_unknown
from receiver.emulator.endings import Failure
from receiver.emulator.keys import Keyring
from receiver.emulator.ledger import PRICE, Prediction
from receiver.emulator.options import Schedule
from receiver.emulator.wire import Refusal, answer
from receiver.emulator.world import World

ERRORS: dict[Failure, tuple[int, str, str]] = {
    "model": (500, "downstream_service_error", "the model could not make a picture"),
    "moderated": (422, "content_policy_violation", "the prompt was flagged by the content checker"),
    "timeout": (504, "generation_timeout", "the generation took too long"),
    "prompt": (422, "value_error.missing", "field required"),
}
_CANCELLED = (499, "client_cancelled", "Request was cancelled by the client")
_NAMESPACES = {"workflows", "comfy"}
_SHORT_ID = re.compile(r"(\d+)-([A-Za-z0-9-]+)")
_DAY = 86400
_LISTED = 50
_MOST_LISTED = 100
_INTERNAL_RETRY = 7
"""In shape `mixed`: the variant, of eight, that fal retried itself: its gateway id differs."""


class Fal(CallsBack):
    """Routes under `/fal`."""

    name = "fal"
    schedule = Schedule(
        waits=tuple(min(2.0 * 2**n, 139.0) for n in range(31)),
        first_timeout=15,
        later_timeout=120,
        lifetime=3600,
        lifetime_large=360,
        redirect_is_final=True,
    )

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._keys = Keyring(world.rng, "x-fal-webhook-", "request-id")
        world.faults.at_once("rotate_keys", self._keys.rotate)

    @classmethod
    def settings(cls) -> dict[str, str]:
        return {
            "FAL_QUEUE_URL": "/fal/queue",
            "FAL_RUN_URL": "/fal/run",
            "FAL_JWKS_URL": "/fal/.well-known/jwks.json",
            "FAL_META_URL": "/fal/v1/meta",
            "FAL_API_URL": "/fal",
        }

    def calls(self) -> wire.Calls:
        one = "/fal/queue/{app:path}/requests/{id}"
        return [
            ("submit", "POST", "/fal/queue/{app:path}", self._submit),
            ("poll", "GET", one + "/status", self._status),
            ("result", "GET", one + "/response", self._result),
            ("result", "GET", one, self._result),
            ("cancel", "PUT", one + "/cancel", self._cancel),
            ("run", "POST", "/fal/run/{app:path}", self._run),
        ]

    def routes(self) -> list[BaseRoute]:
        about = "/fal/v1/models"
        owned: wire.Calls = [
            ("requests", "GET", about + "/requests/by-endpoint", self._requests),
            ("price", "GET", about + "/pricing", self._prices),
        ]
        return [
            *super().routes(),
            *wire.routes("fal", self._owner, owned),
            Route(about, self._models, name="fal.models"),
            Route("/fal/.well-known/jwks.json", self._jwks, name="fal.keys"),
            Route("/fal/v1/meta", self._meta, name="fal.meta"),
            Route(about + "/billing-events", self._bills, name="fal.bill"),
        ]

    def account(self, request: Request) -> str:
        if wire.credential(request, "Bearer"):
            self.world.ledger.violation("fal", "bearer", "the scheme is Key")
        refused = _refused(401, "unauthorized", "Authentication is required")
        return self.world.authenticate(wire.credential(request, "Key"), refused)

    def not_found(self, _request: Request) -> Response:
        return answer({"status": "NOT_FOUND"}, 404)

    def find(self, request: Request, account: str) -> Prediction:
        """Return the prediction that a call is about; raise Refusal if it is of another app."""
        prediction = super().find(request, account)
        if app_of(request.path_params["app"]) != app_of(prediction.model):
            raise Refusal(self.not_found(request))
        return prediction

    def _owner(self, request: Request) -> str:
        """Return the account of a key; raise Refusal in the form of fal's platform API."""
        refused = _platform_error(401, "authorization_error", "Invalid API key")
        return self.world.authenticate(wire.credential(request, "Key"), refused)

    async def _models(self, request: Request) -> Response:
        name = request.query_params.get("endpoint_id", "")
        if not app_of(name) or is_unknown(name):
            return _platform_error(404, "not_found", f"Endpoint '{name}' not found")
        return answer({"models": [_model(name)], "next_cursor": None, "has_more": False})

    async def _requests(self, request: Request, account: str) -> Response:
        """List the finished requests in pages, the latest end first."""
        query = request.query_params
        start, cursor = query.get("start", ""), query.get("cursor", "")
        if not query.get("endpoint_id"):
            return _platform_error(400, "validation_error", "endpoint_id is required")
        since = datetime.fromisoformat(start).timestamp() if start else self.world.now() - _DAY
        limit = min(int(query.get("limit", _LISTED)), _MOST_LISTED)
        first = int(cursor or 0)
        found = sorted(
            (
                one
                for one in self.world.ledger.latest("fal", account)
                if one.finished and one.model == query["endpoint_id"] and one.submitted_at >= since
            ),
            key=lambda one: -(one.completed_at or 0.0),
        )
        more = str(first + limit) if len(found) > first + limit else None
        items = [self._listed(one) for one in found[first : first + limit]]
        return answer({"items": items, "next_cursor": more, "has_more": more is not None})

    def _listed(self, prediction: Prediction) -> dict[str, Any]:
        ok = prediction.state == "succeeded"
        return {
            "request_id": prediction.id,
            "endpoint_id": prediction.model,
            "sent_at": _time(prediction.submitted_at),
            "started_at": _time(prediction.started_at or prediction.submitted_at),
            "ended_at": _time(_ended(prediction)),
            "status_code": 200 if ok else _error(prediction)[0],
            "json_input": prediction.input,
            "json_output": self._output(prediction) if ok else _detail(prediction),
        }

    async def _submit(self, request: Request, account: str) -> Response:
        prediction = await self._read(request, account)
        body = {"status": "IN_QUEUE", "queue_position": self.world.lifecycle.queued["fal"]}
        return await self.accept([prediction], answer(body | _handle(prediction)))

    async def _run(self, request: Request, account: str) -> Response:
        prediction = await self._read(request, account)
        return self._outcome(await self.run(prediction))

    async def _read(self, request: Request, account: str) -> Prediction:
        inputs = await wire.read_object(request)
        model = request.path_params["app"].strip("/")
        hook = request.query_params.get("fal_webhook", "")
        new = self.prediction(request, account, model, inputs, callback_url=hook)
        self.check(self._problems(new, request, inputs))
        return new

    def _problems(
        self, new: Prediction, request: Request, inputs: dict[str, Any] | None
    ) -> Iterator[Response]:
        if rule := self.take("lock_account", new.prompt):
            usual = "Exhausted balance. Top up your balance at fal.ai/dashboard/billing."
            yield answer({"detail": f"User is locked. Reason: {rule.reason or usual}"}, 403)
        if rule := self.refusal(new.prompt):
            kind, words = "runner_scheduling_failure", rule.reason or "busy"
            yield _refused(rule.status, kind, words, rule.headers)
        if not app_of(new.model) or is_unknown(new.model):
            yield _refused(404, "not_found", f"Application {new.model} not found")
        if inputs is None:
            yield _refused(400, "bad_request", "the body is no JSON object")
        if not request.query_params.get("fal_webhook", "http").startswith("http"):
            yield _refused(400, "bad_request", "fal_webhook is no URL")
        if "[refuse]" in new.prompt:
            yield _refused(403, "forbidden", "the balance is used up")

    async def _status(self, request: Request, account: str) -> Response:
        prediction = self.polled(request, account)
        status = 200 if prediction.finished else 202
        headers = {"x-fal-request-id": prediction.id}
        return answer(self._state(prediction, logs=_wants_logs(request)), status, headers)

    def _state(self, prediction: Prediction, *, logs: bool) -> dict[str, Any]:
        state = _handle(prediction)
        if prediction.state == "queued":
            return state | {"status": "IN_QUEUE", "queue_position": 0}
        lines = _logs(prediction) if logs else None
        if prediction.state == "running":
            return state | {"status": "IN_PROGRESS", "logs": lines}
        return state | _completed(prediction) | {"logs": lines}

    async def _result(self, request: Request, account: str) -> Response:
        prediction = self.polled(request, account)
        if prediction.finished:
            return self._outcome(prediction)
        return _refused(400, "bad_request", "Request is still in progress")

    def _outcome(self, prediction: Prediction) -> Response:
        headers = {"x-fal-request-id": prediction.id}
        if prediction.state == "succeeded":
            units = {"x-fal-billable-units": str(prediction.billed)}
            return answer(self._output(prediction), 200, headers | units)
        code, kind, _ = _error(prediction)
        retry = "x-fal-retryable" if prediction.old else "x-fal-needs-retry"
        error_headers = {"x-fal-error-type": kind, retry: "false" if prediction.old else "0"}
        return answer(_detail(prediction), code, headers | error_headers)

    async def _cancel(self, request: Request, account: str) -> Response:
        prediction, stopped = self.canceled(request, account)
        if prediction.old:
            return answer({"success": stopped})
        if stopped:
            return answer({"status": "CANCELLATION_REQUESTED"}, 202)
        return answer({"status": "ALREADY_COMPLETED"}, 400)

    def _output(self, prediction: Prediction) -> dict[str, Any] | str:
        planned = prediction.plan.ending.output
        if isinstance(planned, str):
            return planned
        if planned is not None:
            return {"images": planned, "description": ""}
        if "[text]" in prediction.prompt:
            return {"images": [], "description": "the model answered in words"}
        return {"images": [_picture(url) for url in self.drawn(prediction)], "description": ""}

    async def _jwks(self, _request: Request) -> Response:
        return self.hand_out(self._keys.published(padded=self.world.old()))

    async def _meta(self, _request: Request) -> Response:
        return answer({"webhook_ip_ranges": list(self.world.options.fal_sources)})

    async def _prices(self, request: Request, _account: str) -> Response:
        models = request.query_params.get("endpoint_id", "").split(",")
        price = {"unit_price": PRICE, "unit": "images", "currency": "USD"}
        found = [{"endpoint_id": model, **price} for model in models]
        return answer({"prices": found, "next_cursor": None, "has_more": False})

    async def _bills(self, request: Request) -> Response:
        """List billing events; requires a key with the admin scope: here one with `admin` in it."""
        if "admin" not in wire.credential(request, "Key"):
            return _platform_error(403, "authorization_error", "an admin API key is needed")
        wanted = set(request.query_params.get("request_id", "").split(","))
        since = datetime.fromisoformat(request.query_params["start"]).timestamp()
        found = [
            _bill(one)
            for one in self.world.ledger.all()
            if one.provider == "fal" and one.id in wanted and one.cost and _ended(one) >= since
        ]
        return answer({"billing_events": found, "next_cursor": None, "has_more": False})

    def proof(self, prediction: Prediction, body: bytes, at: float | None) -> dict[str, str]:
        at, forged = self.signing(prediction, at)
        return self._keys.headers(prediction.id, prediction.account, at, body, forged=forged)

    def callback(self, prediction: Prediction) -> bytes:
        """Return the bytes that are signed: keys sorted, a space after every separator."""
        return json.dumps(self.content(prediction), sort_keys=True).encode()

    def content(self, prediction: Prediction) -> dict[str, Any]:
        shape = self.world.options.shape
        retried = shape == "mixed" and prediction.variant % 8 == _INTERNAL_RETRY
        gateway = self.world.new_id() if retried else prediction.id
        ids = {"request_id": prediction.id, "gateway_request_id": gateway}
        return ids | self._ending(prediction)

    def _ending(self, prediction: Prediction) -> dict[str, Any]:
        if prediction.state != "succeeded":
            code, _, _ = _error(prediction)
            error = f"Invalid status code: {code}"
            return {"status": "ERROR", "error": error, "payload": _detail(prediction)}
        if self.take("null_payload", prediction.prompt):
            reason = "Response payload is not JSON serializable"
            return {"status": "OK", "payload": None, "payload_error": reason}
        no_error = {} if prediction.old else {"error": None}
        return {"status": "OK", "payload": self._output(prediction)} | no_error


def app_of(model: str) -> str:
    """Return the app in a model's id, without the path; empty if there is none."""
    parts = model.split("/")
    if short := _SHORT_ID.fullmatch(model):
        parts = [short[1], short[2]]
    length = 3 if parts[0] in _NAMESPACES else 2
    return "/".join(parts[:length]) if len(parts) >= length and all(parts[:length]) else ""


def _refused(
    status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None
) -> Response:
    shown = {"x-fal-error-type": kind, **(headers or {})}
    return answer({"detail": detail, "error_type": kind}, status, shown)


def _platform_error(status: int, kind: str, message: str) -> Response:
    """Return an error in the form of fal's platform API; the queue's has `detail`."""
    return answer({"error": {"type": kind, "message": message}}, status)


def _model(name: str) -> dict[str, Any]:
    return {
        "endpoint_id": name,
        "metadata": {
            "display_name": name.rpartition("/")[2].replace("-", " ").title(),
            "category": "text-to-image",
            "status": "active",
        },
        "openapi": {
            "openapi": "3.0.4",
            "components": {
                "schemas": {
                    "Input": {
                        "type": "object",
                        "required": ["prompt"],
                        "properties": {"prompt": {"type": "string"}},
                    }
                }
            },
        },
    }


def _time(at: float) -> str:
    return wire.moment(at).replace("+00:00", "Z")


def _handle(prediction: Prediction) -> dict[str, Any]:
    """Return the ids and URLs in every state; the URLs omit the path of the model."""
    app = app_of(prediction.model)
    url = f"{prediction.origin}/fal/queue/{app}/requests/{prediction.id}"
    return {
        "request_id": prediction.id,
        "gateway_request_id": prediction.id,
        "response_url": url + "/response" if prediction.old else url,
        "status_url": url + "/status",
        "cancel_url": url + "/cancel",
    }


def _error(prediction: Prediction) -> tuple[int, str, str]:
    if prediction.state == "cancelled" or prediction.plan.failure is None:
        return _CANCELLED
    code, kind, usual = ERRORS[prediction.plan.failure]
    return code, kind, prediction.plan.ending.reason or usual


def _detail(prediction: Prediction) -> dict[str, Any]:
    """Return an error body: a list from the model, plain text from the infrastructure."""
    _, kind, message = _error(prediction)
    if prediction.state == "cancelled":
        return {"detail": message, "error_type": kind}
    loc = ["body"] if prediction.plan.ending.reason else ["body", "prompt"]
    return {"detail": [{"loc": loc, "msg": message, "type": kind}]}


def _completed(prediction: Prediction) -> dict[str, Any]:
    completed = {"status": "COMPLETED", "metrics": {"inference_time": prediction.ran}}
    if prediction.state == "succeeded":
        return completed
    code, kind, message = _error(prediction)
    plain = prediction.state == "cancelled" or prediction.plan.ending.reason
    error = message if plain else f"Invalid status code: {code}"
    return completed | {"error": error, "error_type": kind}


def _logs(prediction: Prediction) -> list[dict[str, str]]:
    started = prediction.started_at or prediction.submitted_at
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(started))
    line = {"level": "INFO", "source": "USER", "timestamp": stamp}
    return [{"message": f"drawing with {prediction.model}", **line}]


def _ended(prediction: Prediction) -> float:
    return prediction.completed_at or prediction.submitted_at


def _bill(prediction: Prediction) -> dict[str, Any]:
    return {
        "request_id": prediction.id,
        "endpoint_id": prediction.model,
        "timestamp": wire.moment(_ended(prediction)),
        "output_units": prediction.billed,
        "unit_price": PRICE,
        "percent_discount": 0,
        "cost_subtotal": prediction.cost,
        "cost_discount": 0,
        "cost_total": prediction.cost,
        "cost_estimate_nano_usd": round(prediction.cost * 1e9),
    }


def _picture(url: str) -> dict[str, Any]:
    file = {"url": url, "content_type": "image/png"}
    return file if url.startswith("data:") else file | {"file_name": url.rpartition("/")[2]}


def _wants_logs(request: Request) -> bool:
    return request.query_params.get("logs", "").lower() in {"1", "true"}
