"""Ideogram: a failure is told to nobody, a withheld picture has no address, prompts are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.emulator import wire
from receiver.emulator.chats import forms
from receiver.emulator.endings import Failure
from receiver.emulator.keys import Keyring, user_id
from receiver.emulator.ledger import Prediction
from receiver.emulator.options import Schedule
from receiver.emulator.wire import Refusal, answer
from receiver.emulator.world import NO_SUCH_MODEL, TEXT_ONLY, World, broken, made

REASONS: dict[Failure, str] = {
    "model": "the model could not make a picture",
    "moderated": "content_policy_violation",
    "timeout": "generation timed out",
    "prompt": "'prompt' is a required property",
    "parameter": "Additional properties are not allowed",
}
_CALLBACKS = Schedule(waits=(5, 30), first_timeout=10, later_timeout=10)
"""No page says when: "retries are limited"."""
_HEADERS = ("x-ideogram-webhook-", "generation-id")
_STALE = 600
_PRICE = 39_000
"""Microdollars for a picture."""
_TAKES_NO_WEBHOOK = "image/generate/auto"
_MAY_BLOCK = "image/"


class Ideogram:
    """Routes under `/ideogram`."""

    settings: ClassVar[Mapping[str, str]] = {
        "IDEOGRAM_BASE_URL": "/ideogram",
        "IDEOGRAM_JWKS_URL": "/ideogram/v1/.well-known/jwks.json",
    }

    def __init__(self, world: World) -> None:
        self._world = world
        self._keys = Keyring(world.rng)
        world.studio.on_finish["ideogram"] = self._push
        world.faults.at_once("rotate_keys", self._keys.rotate)

    def routes(self) -> list[BaseRoute]:
        base = "/ideogram/v2"
        return [
            self._route("poll", "GET", base + "/generations/{id}", self._poll),
            self._route("submit", "POST", base + "/{model:path}", self._submit),
            Route("/ideogram/v1/.well-known/jwks.json", self._jwks, name="ideogram.keys"),
        ]

    def _route(self, call: str, method: str, path: str, handler: wire.Handler) -> BaseRoute:
        return wire.route(f"ideogram.{call}", method, path, self._account, handler)

    def _account(self, request: Request) -> str:
        key = request.headers.get("api-key", "")
        if not self._world.knows(key):
            said = "Access denied. Please verify your API Token is valid."
            raise Refusal(answer({"message": said}, 401))
        return self._world.account(key)

    async def _submit(self, request: Request, account: str) -> Response:
        given = await _read(request)
        prediction = self._described(request, account, given)
        waits = not (given.flag("async") or prediction.callback_url)
        if waits and prediction.model.startswith(_MAY_BLOCK):
            return self._outcome(await self._world.run(prediction))
        return await self._world.accept([prediction], answer({"generation_id": prediction.id}))

    def _described(self, request: Request, account: str, given: forms.Given) -> Prediction:
        model, prompt = request.path_params["model"], given.text("prompt")
        files = {name: file.name for name, file in given.files.items()}
        problem = self._problem(model, given, prompt) or self._crowded(account)
        if problem is None:
            prediction = self._world.prediction(
                *("ideogram", request, account, model, {**given.args, **files}),
                callback_url=given.text("webhook_url"),
            )
            if prediction.plan.failure != "prompt":
                return prediction
            problem = _invalid(REASONS["prompt"])
        self._world.ledger.count("ideogram", "rejected")
        raise Refusal(problem)

    def _problem(self, model: str, given: forms.Given, prompt: str) -> Response | None:
        if rule := self._world.obstacle("ideogram", prompt):
            return answer({"error": rule.reason or "unavailable"}, rule.status, rule.headers)
        if {NO_SUCH_MODEL, TEXT_ONLY} & set(model.split("/")):
            return answer({"error": f"{model} was not found"}, 404)
        if unexpected := _unexpected(model, given):
            return _invalid(f"{REASONS['parameter']} ('{unexpected}' was unexpected)")
        if not given.text("webhook_url").startswith("http") and "webhook_url" in given.args:
            return _invalid("the value is not a 'uri' - 'webhook_url'")
        if "[refuse]" in prompt:
            said = "Add a payment method and credits to use this API key."
            return answer({"error": said, "reject_reason": "insufficient_funds"}, 402)
        return answer({}, 422) if "[unsafe]" in prompt else None

    def _crowded(self, account: str) -> Response | None:
        limit = self._world.options.ideogram_in_flight
        if limit is None or self._world.studio.in_flight("ideogram", account) < limit:
            return None
        self._world.ledger.violation("ideogram", "in_flight", str(limit))
        said = "Too many requests in flight."
        return answer({"error": said, "reject_reason": "inflight_limit"}, 429)

    async def _poll(self, request: Request, account: str) -> Response:
        found = self._world.find_polled("ideogram", request.path_params["id"], account)
        if found is None:
            raise Refusal(answer({"error": "Generation not found"}, 404))
        return answer(self._state(found))

    def _outcome(self, prediction: Prediction) -> Response:
        """Answer a blocking call; no page says how a failure looks there."""
        if _is_told(prediction):
            kind = {"generation_id": prediction.id, "generation_kind": "sampling"}
            return answer(kind | {"seed": prediction.variant, "data": self._made(prediction)})
        return answer({"error": _reason(prediction)}, 400)

    def _state(self, prediction: Prediction) -> dict[str, Any]:
        state = _named(prediction)
        if not prediction.finished:
            return state | {"status": "pending"}
        if not _is_told(prediction):
            return state | {"status": "failed", "failure_reason": _reason(prediction)}
        data = [{"object_type": "image.generation", **each} for each in self._made(prediction)]
        cost = {"usage_cost_usd_micros": _PRICE * max(len(data), 1)}
        return state | {"status": "completed", "response_type": "image", "data": data} | cost

    def _made(self, prediction: Prediction) -> list[dict[str, Any]]:
        more = {"prompt": prediction.prompt, "resolution": "256x256", "seed": prediction.variant}
        if prediction.state == "failed":  # withheld, and paid for
            nothing = "" if prediction.old else None
            return [{"url": nothing, **more, "is_image_safe": False}]
        if prediction.plan.ending.output is None and "[text]" in prediction.prompt:
            return []
        files = made(self._world, prediction)
        if isinstance(files, str):
            return []
        return [{**more, **file, "is_image_safe": True} for file in files]

    async def _jwks(self, _request: Request) -> Response:
        if rule := self._world.faults.take("break_jwks", "ideogram"):
            return broken(rule)
        return answer(self._keys.published(padded=self._world.old()))

    def _push(self, prediction: Prediction) -> None:
        if prediction.callback_url and _is_told(prediction):
            self._world.call(prediction, self.callback(prediction), self.headers, _CALLBACKS)

    def callback(self, prediction: Prediction) -> bytes:
        """Mirror the blocking answer; of a failure, which is never sent, the poll's."""
        if not _is_told(prediction):
            return json.dumps(self._state(prediction)).encode()
        return json.dumps(_named(prediction) | {"data": self._made(prediction)}).encode()

    def headers(
        self, prediction: Prediction, body: bytes, at: float | None = None
    ) -> dict[str, str]:
        """Sign a body, now or as of another time."""
        faults, at = self._world.faults, int(self._world.now() if at is None else at)
        if rule := faults.take("stale_timestamp", "ideogram", prediction.prompt):
            at -= int(_STALE if rule.seconds is None else rule.seconds)
        forged = faults.take("wrong_signature", "ideogram", prediction.prompt) is not None
        signed = self._keys.headers(
            *(_HEADERS, prediction.id, user_id(prediction.account), at, body), forged=forged
        )
        hint = {"x-ideogram-webhook-key-id": "k2"}
        return (
            {"content-type": "application/json", "user-agent": "ideogram-emulator"} | hint | signed
        )


async def _read(request: Request) -> forms.Given:
    """Read JSON or a form of parts; both may say the same."""
    try:
        return await forms.read(request)
    except forms.Unreadable:
        raise Refusal(_invalid("the body cannot be read")) from None


def _unexpected(model: str, given: forms.Given) -> str:
    """Return a field that this endpoint does not know; empty: it knows all."""
    unknown = {"webhook_url": model == _TAKES_NO_WEBHOOK, "async": not model.startswith(_MAY_BLOCK)}
    return next(
        (name for name, is_unknown in unknown.items() if is_unknown and name in given.args), ""
    )


def _invalid(detail: str) -> Response:
    return answer(
        {"type": "about:blank", "title": "Bad Request", "detail": detail, "status": 400}, 400
    )


def _named(prediction: Prediction) -> dict[str, Any]:
    created = datetime.fromtimestamp(prediction.submitted_at, UTC).isoformat()
    return {"generation_id": prediction.id, "created": created}


def _is_told(prediction: Prediction) -> bool:
    """Return whether it has completed: so has one whose pictures the safety check withholds."""
    withheld = prediction.plan.failure == "moderated" and prediction.state == "failed"
    return prediction.state == "succeeded" or withheld


def _reason(prediction: Prediction) -> str:
    failure = prediction.plan.failure or "model"
    return prediction.plan.ending.reason or REASONS[failure]
