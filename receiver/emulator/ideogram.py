"""Ideogram: multipart forms, callbacks only for success, withheld pictures without a URL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.emulator import wire
from receiver.emulator.chats import forms
from receiver.emulator.endings import Failure
from receiver.emulator.fal import user_id
from receiver.emulator.keys import Keyring
from receiver.emulator.ledger import Prediction
from receiver.emulator.options import Schedule
from receiver.emulator.wire import Refusal, answer
from receiver.emulator.world import NO_SUCH_MODEL, TEXT_ONLY, World, broken_response, output_of

REASONS: dict[Failure, str] = {
    "model": "the model could not make a picture",
    "moderated": "the prompt failed the safety check",
    "timeout": "the generation timed out",
    "prompt": "prompt is required",
    "parameter": "unknown field",
}
_CALLBACKS = Schedule(waits=(10, 30), first_timeout=15, later_timeout=15)
_HEADERS = ("x-ideogram-webhook-", "generation-id")
_MICROS = 60_000
"""Price of a picture, in millionths of a dollar."""


class Ideogram:
    """Routes under `/ideogram`."""

    settings: ClassVar[Mapping[str, str]] = {"IDEOGRAM_BASE_URL": "/ideogram"}

    def __init__(self, world: World) -> None:
        self._world = world
        self._keys = Keyring(world.rng)
        world.lifecycle.on_finish["ideogram"] = self._push
        world.faults.at_once("rotate_keys", self._keys.rotate)

    def routes(self) -> list[BaseRoute]:
        calls: wire.Calls = [
            ("submit", "POST", "/ideogram/v2/image/{kind}/{model}", self._submit),
            ("poll", "GET", "/ideogram/v2/generations/{id}", self._poll),
        ]
        return [
            *wire.routes("ideogram", self._account, calls),
            Route("/ideogram/v1/.well-known/jwks.json", self._jwks, name="ideogram.keys"),
        ]

    def _account(self, request: Request) -> str:
        key = request.headers.get("api-key", "")
        return self._world.authenticate(key, _refused(401, "Invalid API key"))

    async def _submit(self, request: Request, account: str) -> Response:
        given = await _read(request)
        prediction = self._read(request, account, given)
        if request.query_params.get("dry_run") == "true":
            return answer({"price_usd_micros": _MICROS})
        if prediction.callback_url or given.flag("async") or given.args.get("async") is True:
            created = {"generation_id": prediction.id}
            return await self._world.accept([prediction], answer(created))
        ended = await self._world.run(prediction)
        if ended.state != "succeeded" and not self._is_withheld(ended):
            return _refused(500, ended.reason(REASONS))
        return answer(self._row(ended) | {"generation_kind": "sampling", "seed": ended.variant})

    def _read(self, request: Request, account: str, given: forms.Given) -> Prediction:
        model, prompt = request.path_params["model"], given.text("prompt")
        if problem := self._problem(account, model, prompt, given):
            raise self._world.rejected("ideogram", problem)
        inputs = given.args | {name: file.name for name, file in given.files.items()}
        prediction = self._world.prediction(
            "ideogram", request, account, model, inputs, callback_url=given.text("webhook_url")
        )
        if prediction.plan.failure == "prompt":
            raise self._world.rejected("ideogram", _refused(400, REASONS["prompt"]))
        return prediction

    def _problem(
        self, account: str, model: str, prompt: str, given: forms.Given
    ) -> Response | None:
        if rule := self._world.refusal("ideogram", prompt):
            return _refused(rule.status, rule.reason or "unavailable", rule.retry_after)
        if model in {NO_SUCH_MODEL, TEXT_ONLY}:
            return _refused(404, f"model {model} not found")
        if "webhook_url" in given.args and not given.text("webhook_url").startswith("http"):
            return _refused(400, "webhook_url is no URL")
        if "[refuse]" in prompt:
            return answer({"message": "Payment required", "reject_reason": "no_funds"}, 402)
        if self._world.is_full("ideogram", account, self._world.options.ideogram_in_flight):
            return _refused(429, "Too many requests", 1)
        return None

    async def _poll(self, request: Request, account: str) -> Response:
        prediction = self._world.find_polled("ideogram", request.path_params["id"], account)
        if prediction is None:
            return _refused(404, "Generation not found")
        return answer(self._state(prediction))

    def _state(self, prediction: Prediction) -> dict[str, Any]:
        if not prediction.finished:
            return _head(prediction) | {"status": "pending"}
        if prediction.state != "succeeded" and not self._is_withheld(prediction):
            failed = {"status": "failed", "failure_reason": prediction.reason(REASONS)}
            return _head(prediction) | failed
        cost = {"usage_cost_usd_micros": _MICROS}
        return self._row(prediction) | {"status": "completed", "response_type": "image", **cost}

    def _is_withheld(self, prediction: Prediction) -> bool:
        """Return whether the safety check withheld the pictures; they are billed all the same."""
        stopped = prediction.plan.failure == "moderated" and prediction.state == "failed"
        return stopped and not prediction.old and not prediction.plan.ending.reason

    def _row(self, prediction: Prediction) -> dict[str, Any]:
        withheld = self._is_withheld(prediction)
        output = [{"url": ""}] if withheld else output_of(self._world, prediction)
        if isinstance(output, str):
            return _head(prediction) | {"data": output}
        more = {"prompt": prediction.prompt, "resolution": "1024x1024", "seed": prediction.variant}
        images = [{**file, **more, "is_image_safe": not withheld} for file in output]
        return _head(prediction) | {"data": images}

    async def _jwks(self, _request: Request) -> Response:
        if rule := self._world.faults.take("break_jwks", "ideogram"):
            return broken_response(rule)
        return answer(self._keys.published(padded=False))

    def _push(self, prediction: Prediction) -> None:
        """Send the callback of a completed prediction; a failure has none."""
        has_callback = prediction.state == "succeeded" or self._is_withheld(prediction)
        if prediction.callback_url and has_callback:
            self._world.push(prediction, self.callback(prediction), self.headers, _CALLBACKS)

    def callback(self, prediction: Prediction) -> bytes:
        """Return the body of a callback; for a failure, too, although none is sent."""
        ended = prediction.state == "succeeded" or self._is_withheld(prediction)
        return msgspec.json.encode(self._row(prediction) if ended else self._state(prediction))

    def headers(
        self, prediction: Prediction, body: bytes, at: float | None = None
    ) -> dict[str, str]:
        """Return the headers that sign a body, now or at `at`; their key id is a wrong hint."""
        at, forged = self._world.signing(prediction, at)
        user = user_id(prediction.account)
        signed = self._keys.headers(_HEADERS, prediction.id, user, at, body, forged=forged)
        kind = {"content-type": "application/json", "user-agent": "ideogram-emulator"}
        return kind | signed | {"x-ideogram-webhook-key-id": "k0"}


async def _read(request: Request) -> forms.Given:
    try:
        return await forms.read(request)
    except forms.Unreadable:
        raise Refusal(_refused(400, "the body cannot be read")) from None


def _head(prediction: Prediction) -> dict[str, Any]:
    return {"generation_id": prediction.id, "created": wire.moment(prediction.submitted_at)}


def _refused(status: int, message: str, retry_after: int | None = None) -> Response:
    headers = None if retry_after is None else {"retry-after": str(retry_after)}
    return answer({"message": message}, status, headers)
