"""The emulator without a socket: a test controls every event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import httpx
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import BaseRoute, Match, Route

from receiver.emulator.chats.platforms import Chats
from receiver.emulator.chats.scene import Scene
from receiver.emulator.emulated import Emulated
from receiver.emulator.endings import Ending
from receiver.emulator.faults import Faults
from receiver.emulator.ledger import Prediction, State
from receiver.emulator.options import Options
from receiver.emulator.oxen import Oxen
from receiver.emulator.providers import CALLING
from receiver.emulator.wire import EventStream, HangUp
from receiver.emulator.world import World

BY_HAND: Final = Options(
    by_hand=Ending(),
    seed=7,
    stray_events=0,
    eachlabs_in_flight=None,
    eachlabs_per_minute=None,
    replicate_per_minute=None,
    ideogram_in_flight=None,
    bfl_in_flight=None,
)


class _Routed(httpx.AsyncBaseTransport):
    """A transport for an HTTP client that calls routes in this process."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._routes = [route for route in routes if isinstance(route, Route)]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = await request.aread()
        route, scope = self._matched(request)

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        answer = await route.endpoint(Request(scope, receive))
        if isinstance(answer, HangUp):
            await asyncio.sleep(answer.after)
            raise httpx.ReadError("the emulator hung up", request=request)
        if isinstance(answer, StreamingResponse):
            stream = _Stream(answer.body_iterator)
            return httpx.Response(answer.status_code, headers=answer.raw_headers, stream=stream)
        return httpx.Response(answer.status_code, headers=answer.raw_headers, content=answer.body)

    def _matched(self, request: httpx.Request) -> tuple[Route, dict[str, Any]]:
        scope: dict[str, Any] = {
            "type": "http",
            "method": request.method,
            "scheme": request.url.scheme,
            "path": request.url.path,
            "query_string": request.url.query,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
        }
        for route in self._routes:
            match, found = route.matches(scope)
            if match is Match.FULL:
                return route, {**scope, **found}
        raise LookupError(f"no provider has {request.method} {request.url}")


class EmulatedChats(_Routed):
    """The three chat platforms as a transport, without retries."""

    def __init__(self, receiver: str, own: str, now: Callable[[], float] = time.time) -> None:
        self.chats = Chats(Scene(receiver, own, now, scale=None))
        super().__init__(self.chats.routes())

    def calls(self, client: httpx.AsyncClient) -> None:
        """Set the client through which the platforms call the app."""
        self.chats.scene.caller.given = client


class EmulatedProviders(_Routed):
    """The providers as a transport for an HTTP client.

    A prediction runs until `end`, and no callback is sent: `callback` and `headers` return what a
    provider would send, `broadcast` writes to Oxen's event streams. A blocking call ends at once.
    Ids are numbered: `fal-1`, `oxen-2`.
    """

    def __init__(self, now: Callable[[], float] = time.time, options: Options = BY_HAND) -> None:
        self._world = World(options, now)
        self._calling = {name: make(self._world) for name, make in CALLING.items()}
        self._oxen = Oxen(self._world)
        everyone: list[Emulated] = [self._oxen, *self._calling.values()]
        super().__init__([route for provider in everyone for route in provider.routes()])

    @property
    def faults(self) -> Faults:
        return self._world.faults

    @property
    def predictions(self) -> list[Prediction]:
        """The accepted predictions, in order of submission."""
        return self._world.ledger.all()

    @property
    def streams(self) -> Sequence[EventStream]:
        """The open connections to Oxen's event stream."""
        return list(self._oxen.streams)

    def find(self, provider_id: str) -> Prediction | None:
        return next((p for p in self.predictions if p.id == provider_id), None)

    def end(self, prediction: Prediction, ending: Ending | None = None) -> None:
        """End a prediction; polls show it from now on."""
        if ending is not None:
            prediction.plan = replace(prediction.plan, ending=ending)
        self._world.lifecycle.end(prediction)

    def cancel(self, prediction: Prediction) -> None:
        self._world.lifecycle.cancel(prediction)

    def broadcast(self, prediction: Prediction) -> None:
        """Send the event of a prediction's end to the connections of Oxen's stream."""
        self._oxen.broadcast(prediction)

    def callback(self, prediction: Prediction, ending: Ending | None = None) -> bytes:
        """Return the body of a callback, as if the prediction had ended with `ending`."""
        plan = prediction.plan
        if ending is not None:
            plan = replace(plan, ending=ending)
        state: State = "failed" if plan.failure else "succeeded"
        ended = replace(prediction, plan=plan, state=state)
        return self._calling[ended.provider].callback(ended)

    def headers(
        self, prediction: Prediction, body: bytes, at: float | None = None
    ) -> dict[str, str]:
        """Return the headers with which a provider proves a body, now or at `at`."""
        return self._calling[prediction.provider].headers(prediction, body, at)

    def kind(self, request: httpx.Request) -> str:
        """Return the name of a request's route, such as `fal.submit`; raise LookupError if none."""
        return str(self._matched(request)[0].name)


class _Stream(httpx.AsyncByteStream):
    """A response body that arrives in chunks."""

    def __init__(self, chunks: Any) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._chunks:
                yield chunk
        except ConnectionResetError as error:
            raise httpx.ReadError(str(error)) from error

    async def aclose(self) -> None:
        await self._chunks.aclose()
