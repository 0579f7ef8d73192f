"""Oxen.ai: a queue without callbacks, an event stream without replay, and blocking calls."""

import base64
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

from starlette.requests import Request
from starlette.responses import Response

from receiver.emulator import pictures, wire
from receiver.emulator.emulated import (
    NO_SUCH_MODEL,
    TEXT_ONLY,
    Emulated,
    picture_names,
    picture_urls,
)
from receiver.emulator.endings import Ending, Failure
from receiver.emulator.ledger import Attempt, Prediction, State
from receiver.emulator.wire import EventStream, Refusal, answer
from receiver.emulator.world import World

STATUSES: dict[State, str] = {
    "queued": "queued",
    "running": "processing",
    "succeeded": "succeeded",
    "failed": "failed",
    "cancelled": "cancelled",
}
REASONS: dict[Failure, str] = {
    "model": "The model failed to generate an image",
    "moderated": "Prompt was blocked by the content policy",
    "timeout": "Generation timed out",
    "prompt": "Prompt cannot be empty",
}
_OWN_PARAMETERS = {"model", "num_generations", "target_namespace"}
_UNEXPECTED = Ending("model", "Unexpected parameter for this model")
_MOST = 4
_CALLS_BACK = ("webhook", "callback")
_FILMING = ("veo-3-1",)
_URL_LIFE = 3600


class Oxen(Emulated):
    """Routes under `/oxen`."""

    name = "oxen"

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.streams: WeakSet[EventStream] = WeakSet()
        """The open streams; a weak set, as only the response keeps a stream alive."""
        world.faults.at_once("cut_stream", self._cut)

    def calls(self) -> wire.Calls:
        queue, ai = "/oxen/api/ai/queue", "/oxen/api/ai"
        return [
            ("submit", "POST", queue, self._submit),
            ("list", "GET", queue, self._list),
            ("poll", "GET", queue + "/{id}", self._poll),
            ("bill", "GET", ai + "/generations/{id}", self._bill),
            ("cancel", "DELETE", queue + "/{id}", self._cancel),
            ("stream", "GET", "/oxen/api/events", self._stream),
            ("run", "POST", ai + "/images/generate", self._run),
            ("run", "POST", ai + "/images/edit", self._run),
            ("run", "POST", ai + "/videos/generate", self._film),
            ("model", "GET", ai + "/models/{id:path}", self._model),
        ]

    def start(self) -> None:
        """Begin to send keep-alive comments on idle streams."""
        self.world.timers.after(self.world.options.keep_alive, self._keep_alive)

    def release(self) -> None:
        """End every stream, so that a stopping server does not have to cut it."""
        for stream in self.streams:
            stream.end()

    def account(self, request: Request) -> str:
        key = wire.credential(request, "Bearer")
        return self.world.authenticate(key, _refused(401, "unauthenticated", "Unauthorized"))

    def not_found(self, _request: Request) -> Response:
        return _refused(404, "resource_not_found", "Resource not found")

    async def _submit(self, request: Request, account: str) -> Response:
        body = await wire.read_object(request) or {}
        self.check(self._problems(body))
        predictions = [
            self._read(request, account, body, index)
            for index in range(body.get("num_generations", 1))
        ]
        rows = [
            {"generation_id": one.id, "status": "processing" if predictions[0].old else "queued"}
            for one in predictions
        ]
        return await self.accept(predictions, answer({"generations": rows}))

    def _problems(self, body: Mapping[str, Any]) -> Iterator[Response]:
        """Yield the refusals for errors that are checked at enqueue; others fail later."""
        prompt = wire.text_of(body.get("prompt"))
        if rule := self.refusal(prompt):
            reason = rule.reason or "Unavailable"
            yield _refused(rule.status, "unknown_error", reason, rule.headers)
        count = body.get("num_generations", 1)
        if type(count) is not int or not 1 <= count <= _MOST:
            detail = f"num_generations must be an integer between 1 and {_MOST}"
            yield _refused(400, "invalid_params", detail)
        if "[refuse]" in prompt:
            yield _refused(402, "invalid_params", "Insufficient credits")
        yield from _model_problems(body.get("model"))

    def _read(
        self, request: Request, account: str, body: Mapping[str, Any], index: int = 0
    ) -> Prediction:
        inputs = {name: value for name, value in body.items() if name not in _OWN_PARAMETERS}
        model = wire.text_of(body.get("model"))
        prediction = self.prediction(request, account, model, inputs, index=index)
        for name in inputs:
            if any(word in name.lower() for word in _CALLS_BACK):
                self.world.ledger.violation("oxen", "webhook_parameter", name)
                prediction.plan = replace(prediction.plan, ending=_UNEXPECTED)
        return prediction

    async def _list(self, request: Request, account: str) -> Response:
        self.world.ledger.count("oxen", "polls")
        query = request.query_params
        if query.get("media_type", "image") != "image":
            return answer({"count": 0, "generations": []})
        statuses = {query["status"]} if "status" in query else {"queued", "processing"}
        rows = [
            _row(prediction)
            for prediction in self.world.ledger.latest("oxen", account)
            if STATUSES[prediction.state] in statuses
            and query.get("model", prediction.model) == prediction.model
        ]
        return answer({"count": len(rows), "generations": rows})

    async def _poll(self, request: Request, account: str) -> Response:
        return answer(_row(self.polled(request, account)))

    async def _bill(self, request: Request, account: str) -> Response:
        """Return a generation with its cost, which no other answer has."""
        prediction = self.find(request, account)
        cost = prediction.cost if prediction.finished else None
        row = {"id": prediction.id, "model": prediction.model, "cost": cost}
        return answer({"generation": row})

    async def _cancel(self, request: Request, account: str) -> Response:
        prediction, _ = self.canceled(request, account)
        return answer({"status": "success", "generation_id": prediction.id})

    async def _stream(self, request: Request, account: str) -> Response:
        stream = EventStream(account)
        self.streams.add(stream)
        return wire.event_stream(self._listen(request, stream))

    async def _listen(self, request: Request, stream: EventStream) -> AsyncIterator[bytes]:
        try:
            async for chunk in stream.chunks(request):
                yield chunk
        finally:
            self.streams.discard(stream)

    async def _run(self, request: Request, account: str) -> Response:
        body = await wire.read_object(request) or {}
        if not wire.text_of(body.get("prompt")):
            self.check([_refused_plainly(REASONS["prompt"])])
        self.check(self._problems(body))
        if body.get("model") in _FILMING:  # the real response is not documented
            self.world.ledger.violation("oxen", "video_as_image", body["model"])
        prediction = await self._succeeded(request, account, body)
        return _blocking_answer(prediction, "images", _images(prediction))

    async def _film(self, request: Request, account: str) -> Response:
        body = await wire.read_object(request) or {}
        self.check(self._problems(body))
        if bool(body.get("prompt")) == bool(body.get("multi_prompt")):
            self.check([_refused_plainly("Exactly one of prompt and multi_prompt is needed", 422)])
        prediction = await self._succeeded(request, account, body)
        return _blocking_answer(prediction, "videos", _videos(prediction))

    async def _succeeded(
        self, request: Request, account: str, body: Mapping[str, Any]
    ) -> Prediction:
        """Run a prediction whose caller waits; raise Refusal for a failure."""
        prediction = await self.run(self._read(request, account, body))
        if prediction.plan.failure:
            raise Refusal(_refused_plainly(prediction.reason(REASONS), 500))
        return prediction

    async def _model(self, request: Request, _account: str) -> Response:
        name = request.path_params["id"]
        return next(_model_problems(name), None) or answer(self._described_model(name))

    def _described_model(self, name: str) -> dict[str, Any]:
        schema = "json_request_schema" if self.world.old() else "request_schema"
        return {
            "id": name,
            "object": "model",
            "display_name": name.replace("-", " ").title(),
            "owned_by": "emulator",
            "endpoint": "/videos/generate" if name in _FILMING else "/images/edit",
            "capabilities": {
                "input": ["text", "image"],
                "output": ["video" if name in _FILMING else "image"],
            },
            "pricing": {"method": "per_image"},
            schema: _SCHEMA,
        }

    def push(self, prediction: Prediction) -> None:
        if prediction.blocking:
            return
        if self.take("cut_stream", prediction.prompt):
            self._cut()
        self.world.push_faults.push(prediction, lambda: self.broadcast(prediction))

    def broadcast(self, prediction: Prediction) -> None:
        """Send the event to the account's open streams; it is never sent again."""
        world, at = self.world, self.world.now()
        listeners = [stream for stream in self.streams if stream.account == prediction.account]
        if not listeners or self.take("silence_stream", prediction.prompt):
            prediction.record_attempt(Attempt(at, error="no stream is open"))
            return
        chunk = wire.event("media_generation_completed", _event(prediction, int(at) + _URL_LIFE))
        if world.rng.random() < world.options.stray_events:
            chunk = wire.event("deployment_updated", {"deployment_id": world.new_id()}) + chunk
        for stream in listeners:
            stream.send(chunk)
        prediction.record_attempt(Attempt(at, 200))

    def _keep_alive(self) -> None:
        if not self.take("silence_stream"):
            for stream in self.streams:
                stream.send(wire.KEEP_ALIVE)
        self.start()

    def _cut(self) -> None:
        for stream in self.streams:
            stream.cut()


_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": {"type": "string"},
        "input_image": {"type": "array", "items": {"type": "string"}},
        "aspect_ratio": {
            "type": "string",
            "default": "16:9",
            "enum": ["1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3"],
        },
    },
}


def _refused(
    status: int, kind: str, title: str, headers: Mapping[str, str] | None = None
) -> Response:
    body = {"error": {"type": kind, "title": title}, "status": "error", "status_message": kind}
    return answer(body, status, headers)


def _refused_plainly(message: str, status: int = 400) -> Response:
    return answer({"error": {"message": message}}, status)


def _model_problems(model: object) -> Iterator[Response]:
    if not isinstance(model, str) or model in {"", NO_SUCH_MODEL}:
        yield _refused(404, "resource_not_found", f"Model not found: {model or ''}")
    if model == TEXT_ONLY:
        yield _refused(400, "invalid_params", ":unsupported_media_type")


def _row(prediction: Prediction) -> dict[str, Any]:
    """Return the queue row, which also contains the submitted fields."""
    return prediction.input | {
        "generation_id": prediction.id,
        "model" if prediction.old else "model_name": prediction.model,
        "prompt": prediction.prompt,
        "media_type": "image",
        "status": STATUSES[prediction.state],
        "result_url": _url(prediction) if prediction.state == "succeeded" else None,
        "error_message": prediction.reason(REASONS) or None,
        "enqueued_at": int(prediction.submitted_at),
        "started_at": _seconds(prediction.started_at),
        "completed_at": _seconds(prediction.completed_at),
    }


def _event(prediction: Prediction, expires: int) -> dict[str, Any]:
    event = {
        "generation_id": prediction.id,
        "status": STATUSES[prediction.state],
        "media_type": "image",
    }
    if prediction.plan.failure:
        return event | {"error": prediction.reason(REASONS)}
    url = _url(prediction)
    if prediction.plan.ending.output is None:
        url = f"{url}?expires={expires}"
    return event | {"model": prediction.model, "url": url}


def _url(prediction: Prediction) -> str | None:
    """Return the URL of the first file; None if there is none."""
    return next((file["url"] for file in _files(prediction)), None)


def _files(prediction: Prediction) -> Sequence[Mapping[str, Any]]:
    planned = prediction.plan.ending.output
    if planned is None:
        return [{"url": url} for url in picture_urls(prediction)]
    return [] if isinstance(planned, str) else planned


def _images(prediction: Prediction) -> Sequence[Mapping[str, Any]]:
    """Return the pictures of a blocking call, as URLs or in base64."""
    if prediction.input.get("response_format") != "b64_json":
        return _files(prediction)
    drawn = [pictures.draw(name) or b"" for name in picture_names(prediction)]
    return [{"b64_json": base64.b64encode(picture).decode()} for picture in drawn]


def _videos(prediction: Prediction) -> list[dict[str, Any]]:
    if prediction.input.get("response_format") == "b64_json":
        return [{"b64_json": base64.b64encode(pictures.FILM).decode()}]
    return [{"url": file["url"].replace(".png", ".mp4")} for file in _files(prediction)]


def _blocking_answer(
    prediction: Prediction, kind: str, files: Sequence[Mapping[str, Any]]
) -> Response:
    created = int(prediction.submitted_at)
    return answer({"model": prediction.model, "created": created, kind: files})


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)
