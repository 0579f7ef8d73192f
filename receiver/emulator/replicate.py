"""Replicate: submits, polls and callbacks have one form; data is removed after an hour."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import islice
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from receiver.emulator import wire
from receiver.emulator.emulated import NO_SUCH_MODEL, CallsBack, is_unknown
from receiver.emulator.endings import Failure
from receiver.emulator.ledger import Prediction, State
from receiver.emulator.options import Schedule
from receiver.emulator.secrets import AccountSecret
from receiver.emulator.wire import Refusal, answer
from receiver.emulator.world import World

REASONS: dict[Failure, str] = {
    "model": "Prediction interrupted; please retry (code: PA)",
    "moderated": "NSFW content detected. Try running it again, or try a different prompt.",
    "timeout": "Prediction timed out",
    "prompt": "prompt is required",
}
_STATUSES: dict[State, str] = {
    "queued": "starting",
    "running": "processing",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "canceled",
}
_KEPT = 3600
_MINUTE = 60
_PAGE = 100
_LONGEST_WAIT = 60
_WAIT = re.compile(r"wait(?:=(\d+))?")
_DEADLINE = re.compile(r"(\d+)([sm]?)")
_VERSION = re.compile(r"(?:[\w.-]+/[\w.-]+:)?[\da-f]{64}")


class Replicate(CallsBack):
    """Routes under `/replicate`."""

    name = "replicate"
    schedule = Schedule(
        waits=(1, 2, 4, 8, 16, 32),
        first_timeout=10,
        later_timeout=10,
        lifetime=60,
        redirect_is_final=True,
    )
    """The last retry is about a minute after the end; after a redirect there is none."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self._secret = AccountSecret(world.rng)
        self._aborted: set[str] = set()
        world.faults.at_once("rotate_keys", self._secret.rotate)

    def calls(self) -> wire.Calls:
        base = "/replicate/v1"
        one, model = base + "/predictions/{id}", base + "/models/{owner}/{name}"
        return [
            ("submit", "POST", base + "/predictions", self._submit),
            ("submit", "POST", model + "/predictions", self._submit),
            ("submit", "POST", base + "/deployments/{owner}/{name}/predictions", self._submit),
            ("list", "GET", base + "/predictions", self._list),
            ("poll", "GET", one, self._poll),
            ("cancel", "POST", one + "/cancel", self._cancel),
            ("account", "GET", base + "/account", self._account_info),
            ("keys", "GET", base + "/webhooks/default/secret", self._webhook_secret),
            ("model", "GET", model, self._model),
            ("version", "GET", model + "/versions/{id}", self._version),
        ]

    def account(self, request: Request) -> str:
        detail = "You did not pass a valid authentication token"
        refused = _refused(401, detail, title="Unauthenticated")
        return self.world.authenticate(wire.credential(request, "Bearer"), refused)

    def not_found(self, _request: Request) -> Response:
        return _missing()

    async def _submit(self, request: Request, account: str) -> Response:
        body = await wire.read_object(request) or {}
        prediction = self._read(request, account, body)
        self._schedule_deadline(prediction, request.headers.get("cancel-after", ""))
        wanted = _WAIT.match(request.headers.get("prefer", ""))
        if wanted is None:
            return await self.accept([prediction], answer(self.content(prediction), 201))
        seconds = min(int(wanted[1] or _LONGEST_WAIT), _LONGEST_WAIT)
        return answer(self.content(await self.run(prediction, seconds)), 201)

    def _read(self, request: Request, account: str, body: dict[str, Any]) -> Prediction:
        given, model = body.get("input"), _model_of(request, body)
        hook, events = wire.text_of(body.get("webhook")), body.get("webhook_events_filter")
        wanted = hook if not isinstance(events, list) or "completed" in events else ""
        inputs = given if isinstance(given, dict) else {}
        new = self.prediction(request, account, model, inputs, callback_url=wanted)
        self.check(self._problems(new, body))
        return new

    def _problems(self, new: Prediction, body: Mapping[str, Any]) -> Iterator[Response]:
        if rule := self.refusal(new.prompt):
            yield self._later(rule.status, rule.reason or "Service unavailable", rule.retry_after)
        if not new.model or is_unknown(new.model):
            yield _missing()
        if not isinstance(body.get("input"), dict):
            yield _invalid("input", "Invalid type. Expected: object")
        if not wire.text_of(body.get("webhook", "https:")).startswith(("https:", "http:")):
            yield _invalid("webhook", "Does not match format 'uri'")
        if "[refuse]" in new.prompt:
            detail = "You have insufficient credit to run this model."
            yield _refused(402, detail, title="Insufficient credit")
        if wait := self.wait_for_rate(new.account, self.world.options.replicate_per_minute):
            yield self._later(429, "Request was throttled.", wait)
        if new.plan.failure == "prompt":
            yield _invalid("input.prompt", REASONS["prompt"])

    def _later(self, status: int, detail: str, seconds: int | None) -> Response:
        """Return a refusal that states when to retry: in its text, in a field or in a header."""
        if seconds is None:
            return _refused(status, detail)
        if self.world.old():
            return _refused(status, f"{detail} Your rate limit resets in ~{seconds}s.")
        if self.world.options.shape == "mixed":
            return _refused(status, detail, retry_after=seconds)
        return _refused(status, detail, headers={"retry-after": str(seconds)})

    def _schedule_deadline(self, prediction: Prediction, text: str) -> None:
        """Cancel a prediction after the time in its Cancel-After header."""
        if found := _DEADLINE.fullmatch(text):
            seconds = int(found[1]) * (_MINUTE if found[2] == "m" else 1)
            self.world.timers.after(seconds, lambda: self._cancel_at_deadline(prediction))

    def _cancel_at_deadline(self, prediction: Prediction) -> None:
        if prediction.state == "queued":
            self._aborted.add(prediction.id)
        if self.world.lifecycle.cancel(prediction):
            self.push(prediction)

    async def _list(self, request: Request, account: str) -> Response:
        after, before = (
            request.query_params.get(name, "") for name in ("created_after", "created_before")
        )
        cursor = request.query_params.get("cursor", "0")
        start = int(cursor) if cursor.isdecimal() else 0
        rows = (
            self.content(each)
            for each in self.world.ledger.latest("replicate", account)
            if _moment(after, 0.0) <= each.submitted_at <= _moment(before, float("inf"))
        )
        page = list(islice(rows, start, start + _PAGE + 1))
        more = f"{request.url.include_query_params(cursor=start + _PAGE)}"
        following = more if len(page) > _PAGE else None
        return answer({"next": following, "previous": None, "results": page[:_PAGE]})

    async def _poll(self, request: Request, account: str) -> Response:
        return answer(self.content(self.polled(request, account)))

    async def _cancel(self, request: Request, account: str) -> Response:
        prediction, canceled = self.canceled(request, account)
        if canceled and self.world.options.by_hand is None:
            self.push(prediction)
        return answer(self.content(prediction))

    async def _account_info(self, _request: Request, account: str) -> Response:
        return answer({"type": "user", "username": account, "name": account, "github_url": ""})

    async def _webhook_secret(self, _request: Request, _account: str) -> Response:
        return self.hand_out({"key": self._secret.shown})

    async def _model(self, request: Request, _account: str) -> Response:
        return answer(_described_model(request))

    async def _version(self, request: Request, _account: str) -> Response:
        return answer(_described_version(request.path_params["id"]))

    def content(self, prediction: Prediction) -> dict[str, Any]:
        """Return a prediction in the form of all channels."""
        url = f"{prediction.origin}/replicate/v1/predictions/{prediction.id}"
        ended = prediction.completed_at
        removed = ended is not None and self.world.now() - ended > _KEPT
        state = {
            "id": prediction.id,
            "model": prediction.model.partition(":")[0],
            "version": prediction.model.partition(":")[2] or "hidden",
            "input": {} if removed else prediction.input,
            "logs": "",
            "output": None if removed else self._output(prediction),
            "data_removed": removed,
            "error": prediction.reason(REASONS) or None,
            "source": "api",
            "status": self._status(prediction),
            "created_at": _time(prediction.submitted_at),
            "started_at": _time(prediction.started_at),
            "completed_at": _time(ended),
            "urls": {"cancel": url + "/cancel", "get": url},
            "metrics": _metrics(prediction),
        }
        if prediction.callback_url:
            filtered = {"webhook_events_filter": ["completed"]}
            state |= {"webhook": prediction.callback_url, **filtered}
        return state

    def _status(self, prediction: Prediction) -> str:
        return "aborted" if prediction.id in self._aborted else _STATUSES[prediction.state]

    def _output(self, prediction: Prediction) -> Any:
        """Return a file, several files, or text in pieces, as the models differ."""
        if prediction.state != "succeeded":
            return None
        planned = prediction.plan.ending.output
        if planned is not None:
            return planned
        if "[text]" in prediction.prompt:
            return ["the model ", "answered in words"]
        urls = self.drawn(prediction)
        return urls if len(urls) > 1 or prediction.old else urls[0]

    def proof(self, prediction: Prediction, body: bytes, at: float | None) -> dict[str, str]:
        at, forged = self.signing(prediction, at)
        return self._secret.headers(f"msg_{prediction.id}", at, body, forged=forged)


def _missing() -> Response:
    return _refused(404, "The requested resource could not be found.")


def _model_of(request: Request, body: Mapping[str, Any]) -> str:
    """Return the model in a submit's path or version; empty if there is none."""
    owner, name = (request.path_params.get(part) for part in ("owner", "name"))
    if owner and name:
        return f"{owner}/{name}"
    version = wire.text_of(body.get("version"))
    if _VERSION.fullmatch(version):
        return version if ":" in version else f"emulated/model:{version}"
    return version if version.count("/") == 1 and ":" not in version else ""


def _refused(
    status: int,
    detail: str,
    *,
    title: str = "",
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> Response:
    body = {"title": title} if title else {}
    return answer({**body, "detail": detail, "status": status, **more}, status, headers)


def _invalid(name: str, description: str) -> Response:
    field = {"type": "invalid", "field": name, "description": description}
    detail = f"- {name}: {description}\n"
    return _refused(422, detail, title="Input validation failed", invalid_fields=[field])


def _metrics(prediction: Prediction) -> dict[str, float]:
    if prediction.completed_at is None:
        return {}
    total = round(prediction.completed_at - prediction.submitted_at, 3)
    return {"predict_time": prediction.ran, "total_time": total}


def _described_version(version: str) -> dict[str, Any]:
    """Return a version whose output is one file, as for most picture models."""
    output = {"type": "string", "format": "uri", "title": "Output"}
    return {
        "id": version,
        "created_at": _time(0.0),
        "cog_version": "0.14.0",
        "openapi_schema": {"components": {"schemas": {"Output": output}}},
    }


def _described_model(request: Request) -> dict[str, Any]:
    owner, name = request.path_params["owner"], request.path_params["name"]
    if NO_SUCH_MODEL in {owner, name}:
        raise Refusal(_missing())
    return {
        "url": f"{wire.origin(request)}/{owner}/{name}",
        "owner": owner,
        "name": name,
        "description": "Draws what it is asked for.",
        "visibility": "public",
        "run_count": 7,
        "default_example": None,
        "latest_version": _described_version("0" * 64),
    }


def _time(at: float | None) -> str | None:
    return None if at is None else wire.moment(at)


def _moment(text: str, otherwise: float) -> float:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return otherwise
