"""Ideogram: multipart forms, callbacks only for success, withheld pictures without a URL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.emulator import wire
from receiver.emulator.chats import forms
from receiver.emulator.emulated import CallsBack, is_unknown
from receiver.emulator.endings import Failure
from receiver.emulator.keys import Keyring
from receiver.emulator.ledger import Prediction
from receiver.emulator.options import Schedule
from receiver.emulator.wire import Refusal, answer
from receiver.emulator.world import World

REASONS: dict[Failure, str] = {
    "model": "the model could not make a picture",
    "moderated": "the prompt failed the safety check",
    "timeout": "the generation timed out",
    "prompt": "prompt is required",
}
_MICROS = 60_000
"""Price of a picture, in millionths of a dollar."""


class Ideogram(CallsBack):
    """Routes under `/ideogram`."""

    name = "ideogram"
    schedule = Schedule(waits=(10, 30), first_timeout=15, later_timeout=15)

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._keys = Keyring(world.rng, "x-ideogram-webhook-", "generation-id")
        world.faults.at_once("rotate_keys", self._keys.rotate)

    def calls(self) -> wire.Calls:
        return [
            ("submit", "POST", "/ideogram/v2/image/{kind}/{model}", self._submit),
            ("poll", "GET", "/ideogram/v2/generations/{id}", self._poll),
        ]

    def routes(self) -> list[BaseRoute]:
        keys = Route("/ideogram/v1/.well-known/jwks.json", self._jwks, name="ideogram.keys")
        return [*super().routes(), keys]

    def account(self, request: Request) -> str:
        key = request.headers.get("api-key", "")
        return self.world.authenticate(key, _refused(401, "Invalid API key"))

    def not_found(self, _request: Request) -> Response:
        return _refused(404, "Generation not found")

    async def _submit(self, request: Request, account: str) -> Response:
        given = await _read(request)
        prediction = self._prediction(request, account, given)
        if request.query_params.get("dry_run") == "true":
            return answer({"price_usd_micros": _MICROS})
        if prediction.callback_url or given.flag("async") or given.args.get("async") is True:
            created = {"generation_id": prediction.id}
            return await self.accept([prediction], answer(created))
        ended = await self.run(prediction)
        if not self._has_row(ended):
            return _refused(500, ended.reason(REASONS))
        return answer(self._row(ended) | {"generation_kind": "sampling", "seed": ended.variant})

    def _prediction(self, request: Request, account: str, given: forms.Given) -> Prediction:
        inputs = given.args | {name: file.name for name, file in given.files.items()}
        model, hook = request.path_params["model"], given.text("webhook_url")
        new = self.prediction(request, account, model, inputs, callback_url=hook)
        self.check(self._problems(new))
        return new

    def _problems(self, new: Prediction) -> Iterator[Response]:
        if rule := self.refusal(new.prompt):
            yield _refused(rule.status, rule.reason or "unavailable", rule.headers)
        if is_unknown(new.model):
            yield _refused(404, f"model {new.model} not found")
        if "webhook_url" in new.input and not new.callback_url.startswith("http"):
            yield _refused(400, "webhook_url is no URL")
        if "[refuse]" in new.prompt:
            yield answer({"message": "Payment required", "reject_reason": "no_funds"}, 402)
        if self.is_full(new.account, self.world.options.ideogram_in_flight):
            yield _refused(429, "Too many requests", {"retry-after": "1"})
        if new.plan.failure == "prompt":
            yield _refused(400, REASONS["prompt"])

    async def _poll(self, request: Request, account: str) -> Response:
        return answer(self._state(self.polled(request, account)))

    def _state(self, prediction: Prediction) -> dict[str, Any]:
        if not prediction.finished:
            return _head(prediction) | {"status": "pending"}
        if not self._has_row(prediction):
            failed = {"status": "failed", "failure_reason": prediction.reason(REASONS)}
            return _head(prediction) | failed
        cost = {"usage_cost_usd_micros": _MICROS}
        return self._row(prediction) | {"status": "completed", "response_type": "image", **cost}

    def _is_withheld(self, prediction: Prediction) -> bool:
        """Return whether the safety check withheld the pictures; they are billed all the same."""
        stopped = prediction.plan.failure == "moderated" and prediction.state == "failed"
        return stopped and not prediction.old and not prediction.plan.ending.reason

    def _has_row(self, prediction: Prediction) -> bool:
        """Return whether there are pictures, or withheld ones."""
        return prediction.state == "succeeded" or self._is_withheld(prediction)

    def _row(self, prediction: Prediction) -> dict[str, Any]:
        withheld, output = self._is_withheld(prediction), prediction.plan.ending.output
        if withheld:
            output = ({"url": ""},)
        elif output is None:
            output = tuple({"url": url} for url in self.drawn(prediction))
        if isinstance(output, str):
            return _head(prediction) | {"data": output}
        more = {"prompt": prediction.prompt, "resolution": "1024x1024", "seed": prediction.variant}
        images = [{**file, **more, "is_image_safe": not withheld} for file in output]
        return _head(prediction) | {"data": images}

    async def _jwks(self, _request: Request) -> Response:
        return self.hand_out(self._keys.published(padded=False))

    def push(self, prediction: Prediction) -> None:
        """Send the callback of a completed prediction; a failure has none."""
        if self._has_row(prediction):
            super().push(prediction)

    def content(self, prediction: Prediction) -> dict[str, Any]:
        """Return the content of a callback; for a failure, too, although none is sent."""
        return self._row(prediction) if self._has_row(prediction) else self._state(prediction)

    def proof(self, prediction: Prediction, body: bytes, at: float | None) -> dict[str, str]:
        """Return the headers that sign a body, now or at `at`; their key id is a wrong hint."""
        at, forged = self.signing(prediction, at)
        signed = self._keys.headers(prediction.id, prediction.account, at, body, forged=forged)
        return signed | {"x-ideogram-webhook-key-id": "k0"}


async def _read(request: Request) -> forms.Given:
    try:
        return await forms.read(request)
    except forms.Unreadable:
        raise Refusal(_refused(400, "the body cannot be read")) from None


def _head(prediction: Prediction) -> dict[str, Any]:
    return {"generation_id": prediction.id, "created": wire.moment(prediction.submitted_at)}


def _refused(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return answer({"message": message}, status, headers)
