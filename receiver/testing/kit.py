"""A whole receiver in a test: the real app, a temporary database, and providers on a string."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import httpx
import msgspec
from starlette.applications import Starlette

from receiver.app import create_app
from receiver.deliveries.registry import Handler, Registered, load, registered_of
from receiver.emulator.board import Message, Platform
from receiver.emulator.calling import Exchange
from receiver.emulator.chats import Chats
from receiver.emulator.endings import Ending
from receiver.emulator.inprocess import EmulatedChats, EmulatedProviders
from receiver.emulator.ledger import Prediction as Emulated
from receiver.model.answers import Delivery, Explanation
from receiver.model.states import TERMINAL
from receiver.model.values import Event, Prediction
from receiver.settings import Settings
from receiver.testing.chat import SETTINGS as CHAT_SETTINGS
from receiver.testing.chat import ChatEdge, Said, button_of, emulated_chats, environment
from receiver.testing.edge import Answer, answers, finds
from receiver.testing.providers import SETTINGS, ending_of, refusals_of

T = TypeVar("T")

PATIENCE: Final = 30.0
"""Seconds after which a test that waits has failed."""
_API_KEY: Final = "api-key-of-a-test"
_SETTINGS: Final = {
    **SETTINGS,
    "RECEIVER_SECRET_KEY": "the-secret-key-of-nothing-but-a-test",
    "RECEIVER_API_KEYS": _API_KEY,
    "RECEIVER_PUBLIC_URL": "https://receiver.test",
}
_MOST_MOVES: Final = 100
_DRAIN: Final = "/v1/drain?seconds=60"


class Clock:
    """The wall clock, and whatever it is told to be ahead."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead

    def move(self, seconds: float) -> None:
        self.ahead += seconds


@dataclass(frozen=True)
class Delivered:
    """What became of an event: it is read anew each time it is looked at."""

    kit: Kit
    prediction_id: str

    @property
    def prediction(self) -> Prediction:
        return self.kit.get(f"/v1/predictions/{self.prediction_id}", Prediction)

    def __repr__(self) -> str:
        if not self.kit.answers:
            return f"<Delivered {self.prediction_id}>"
        prediction = self.prediction
        deliveries = [repr(delivery) for delivery in self.deliveries.values()]
        about = f"{prediction.provider} {prediction.model} {prediction.status}"
        return f"<Delivered {about}: {', '.join(deliveries) or self._unwanted()}>"

    @property
    def deliveries(self) -> dict[str, Delivery]:
        """By the names of their handlers."""
        found = self.kit.get(f"/v1/deliveries?prediction={self.prediction_id}&limit=100", _Page)
        return {delivery.handler: delivery for delivery in found.data}

    @property
    def delivery(self) -> Delivery:
        """The only one; ValueError, which says why, where there is none, or there are several."""
        __tracebackhide__ = True
        deliveries = [*self.deliveries.values()]
        if len(deliveries) == 1:
            return deliveries[0]
        several = ", ".join(repr(delivery) for delivery in deliveries)
        raise ValueError(f"several deliveries: {several}" if several else self._unwanted())

    @property
    def children(self) -> list[Prediction]:
        """The predictions that its handlers submitted, the first one first."""
        found = self.kit.get("/v1/predictions?limit=100", _Predictions).data
        return [child for child in reversed(found) if child.parent_id == self.prediction_id]

    def _unwanted(self) -> str:
        """Say of every handler why it did not want the event."""
        path = f"/v1/predictions/{self.prediction_id}/explain"
        explained = self.kit.get(path, Explanation)
        whys = [f"{one.handler} ({one.reason or 'it runs'})" for one in explained.handlers]
        return f"no handler has had {explained.type}: {', '.join(whys) or 'there is none'}"


class _Delivery(Delivery, frozen=True, kw_only=True):
    """A delivery whose repr says in one line how it stands."""

    def __repr__(self) -> str:
        attempts = f"{self.attempts} attempt{'s' if self.attempts != 1 else ''}"
        failures = [attempt.reason for attempt in self.history if attempt.reason]
        last = failures[-1] if failures else ""
        whys = dict.fromkeys(filter(None, (self.reason, last)))
        return f"<Delivery {self.handler} {self.state}, {': '.join([attempts, *whys])}>"


class _Page(msgspec.Struct):
    data: list[_Delivery]


class _Predictions(msgspec.Struct):
    data: list[Prediction]


class Kit:
    """Runs handlers as a receiver does, step by step: nothing happens that a test did not ask for.

    `handlers` are decorated functions, or names as `receiver serve` takes them. `http` answers what
    `ctx.http` sends and `files` is what `ctx.fetch` finds, by URL; `online` lets both out to the
    network instead, this machine included. `settings` are environment variables of the receiver.
    With `chats` there are a Slack, a Discord and a Telegram, and handlers that are named find
    their accounts there in the environment: `says` and `presses` are what people do in them.
    All methods block, and raise AssertionError where what they were asked for does not happen.
    """

    def __init__(
        self,
        *handlers: Callable[..., Any] | str,
        http: Answer | None = None,
        files: Mapping[str, bytes] | None = None,
        online: bool = False,
        chats: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        if online and chats:
            raise ValueError("chats are emulated, so they cannot be online")
        self.clock = Clock()
        self._leash = _Leash()
        with environment(CHAT_SETTINGS if chats else {}):
            self._handlers = [
                self._leash.on(one) if isinstance(one, Handler) else one
                for one in _handlers(handlers)
            ]
        self._http = None if online else answers(http)
        self._results = None if online else finds(files or {})
        self._folder = tempfile.TemporaryDirectory(prefix="receiver-kit-")
        private = {"RECEIVER_ALLOW_PRIVATE_FETCH": "1"} if online else {}
        self._settings = {**_SETTINGS, **private, **(settings or {})}
        self._providers = EmulatedProviders(self.clock)
        self._chats = self._emulate_chats() if chats else None
        self._lives = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._life = self._do(self._begin())
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the receiver and remove its database."""
        try:
            self._do(self._life.stop())
        finally:
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()
        self._folder.cleanup()

    @property
    def answers(self) -> bool:
        """False once it is closed, and to its own loop, which cannot wait for itself."""
        return self._loop.is_running() and threading.current_thread() is not self._thread

    # --- what may happen to an event ---

    def deliver(self, event: Event, times: int = 1) -> Delivered:
        """Submit what the event is about, have it end so, and run what that makes due.

        The provider says so `times` times: by callback, or on its stream (Oxen.ai). The event that
        handlers see has ids and times of its own.
        """
        return self._do(self._deliver(event, times))

    def lose_callback(self, event: Event) -> Delivered:
        """Let the provider finish and its callback never arrive; then let time pass."""
        return self._do(self._lose(event))

    def crash_after_ack(self, event: Event) -> Delivered:
        """Kill the receiver when it has said 2xx and nothing has run yet; then start it again."""
        return self._do(self._crash_after_ack(event))

    def crash_after_run(self, event: Event) -> Delivered:
        """Kill the receiver when a handler has returned and nobody knows; then start it again.

        Whatever the handler did is done, and it runs once more.
        """
        return self._do(self._crash_after_run(event))

    def calls(
        self,
        path: str,
        body: bytes | str = b"",
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
    ) -> httpx.Response:
        """Call a plugin's route, as `/in/shop`, as a stranger does; then run what is due."""
        return self._do(self._calls(method, path, body, headers))

    def replay(self, delivered: Delivered) -> None:
        """Redeliver the event to its handlers, and run them."""
        self._do(self._post_and_drain(f"/v1/predictions/{delivered.prediction_id}/replay"))

    def finish(self, child: Prediction, event: Event) -> Delivered:
        """End a prediction that a handler submitted as an event did."""
        return self._do(self._finish(child, event))

    def move(self, seconds: float) -> None:
        """Let so much time pass, and run what is due then."""
        self.clock.move(seconds)
        self._do(self._drain())

    def exhaust(self, delivered: Delivered) -> None:
        """Let time pass until all deliveries of an event have ended."""
        for _ in range(_MOST_MOVES):
            due = [d.due_at for d in delivered.deliveries.values() if d.due_at is not None]
            if not due:
                return
            self.move(max(datetime.fromisoformat(min(due)).timestamp() - self.clock(), 0.0) + 0.01)
        raise AssertionError(f"still not at its end: {delivered.deliveries}")

    def says(
        self,
        text: str,
        *,
        person: str = "U1",
        place: str = "C1",
        on: Platform = "slack",
        files: Mapping[str, bytes] | None = None,
        finish: bool = True,
    ) -> Said:
        """Say something in a chat; run all that comes of it, until the pictures are there.

        With `finish=False` it ends when the receiver has answered: `finish_all` does the rest.
        """
        people, given = self.chats.people[on], tuple((files or {}).items())
        say = people.says(text, person, place, files=given)
        return self._do(self._chat(on, person, say, finish=finish))

    def presses(
        self,
        message: Message,
        label: str,
        *,
        person: str = "U1",
        on: Platform = "slack",
        finish: bool = True,
    ) -> Said:
        """Press the button of that label under a message; run all that comes of it, as `says`."""
        press = self.chats.people[on].presses(message, button_of(message, label), person)
        return self._do(self._chat(on, person, press, finish=finish))

    def repeat(self, said: Said, times: int = 1) -> Said:
        """Repeat what the platform sent, so many times at once; run all that comes of it."""
        on = said.board.platform
        if said.exchange is None:
            raise ValueError("the receiver was not told")
        return self._do(self._say_again(on, said, said.exchange, times))

    def finish_all(self, event: Event | None = None) -> None:
        """End all predictions, with pictures or as an event did, and run what is due."""
        self._do(self._finish_all(event))

    @property
    def chats(self) -> Chats:
        """The chat platforms: what they show, and how their tokens die."""
        if self._chats is None:
            raise ValueError("this kit has no chats: receiver_kit(…, chats=True)")
        return self._chats.chats

    def get(self, path: str, kind: type[T]) -> T:
        """Read what the API answers; `kind` is what it is to be."""
        return msgspec.json.decode(self._do(self._call("GET", path)), type=kind)

    # --- how ---

    def _emulate_chats(self) -> EmulatedChats:
        """Put the chat platforms where handlers send and fetch."""
        url, key = _SETTINGS["RECEIVER_PUBLIC_URL"], self._settings["RECEIVER_SECRET_KEY"]
        found = emulated_chats(url, key, self.clock)
        if self._http is not None and self._results is not None:
            self._http, self._results = (
                ChatEdge(found, others) for others in (self._http, self._results)
            )
        return found

    async def _chat(
        self,
        on: Platform,
        person: str,
        do: Coroutine[Any, Any, Exchange | None],
        *,
        finish: bool,
    ) -> Said:
        board, name = self.chats.boards[on], self.chats.name(on, person)
        since = len(board.messages)
        exchange = await do
        if exchange is not None and not exchange.is_ok:
            why = exchange.error or f"{exchange.status} {exchange.answer.decode()}"
            raise AssertionError(f"{exchange.url} was answered {why}")
        if finish:
            await self._finish_all(None)
        return Said(board, exchange, name, since)

    async def _say_again(self, on: Platform, said: Said, exchange: Exchange, times: int) -> Said:
        people, since = self.chats.people[on], len(said.board.messages)
        again = [people.repeat(exchange, number + 1) for number in range(times)]
        exchanges = await asyncio.gather(*again)
        await self._finish_all(None)
        return Said(said.board, exchanges[-1] if exchanges else None, said.person, since)

    async def _finish_all(self, event: Event | None) -> None:
        for _ in range(_MOST_MOVES):
            await self._drain()
            # What the receiver's own loop is submitting, beside the drain, comes in a moment.
            is_coming = bool(await self._of("submitting"))
            working = await self._of("processing")
            if is_coming and not working:
                await asyncio.sleep(0.05)
            elif not working:
                return
            for prediction in working:
                taken = self._taken(prediction.provider_id or "")
                await self._tell(taken, event, prediction.id, 1)
        raise AssertionError("handlers submit without end")

    async def _of(self, status: str) -> list[Prediction]:
        content = await self._call("GET", f"/v1/predictions?status={status}&limit=100")
        return msgspec.json.decode(content, type=_Predictions).data

    async def _deliver(self, event: Event, times: int) -> Delivered:
        delivered, taken = await self._submitted(event)
        if taken is not None:
            await self._tell(taken, event, delivered.prediction_id, times)
        await self._drain()
        return delivered

    async def _lose(self, event: Event) -> Delivered:
        delivered, taken = await self._submitted(event)
        if taken is None:
            raise AssertionError("the provider took nothing, so there is no callback to lose")
        self._finish_there(taken, event)
        await self._poll(delivered.prediction_id)
        return delivered

    async def _finish(self, child: Prediction, event: Event) -> Delivered:
        if child.provider_id is None:  # it was placed, and is being submitted
            await self._drain()
            content = await self._call("GET", f"/v1/predictions/{child.id}")
            child = msgspec.json.decode(content, type=Prediction)
        if child.provider_id is None:
            raise AssertionError("no provider has taken it")
        taken = self._taken(child.provider_id)
        await self._tell(taken, event, child.id, 1)
        await self._drain()
        return Delivered(self, child.id)

    async def _crash_after_ack(self, event: Event) -> Delivered:
        delivered, taken = await self._submitted(event)
        if taken is not None:
            await self._tell(taken, event, delivered.prediction_id, 1)
        await self._crash()
        await self._drain()
        return delivered

    async def _crash_after_run(self, event: Event) -> Delivered:
        delivered, taken = await self._submitted(event)
        if taken is not None:
            await self._tell(taken, event, delivered.prediction_id, 1)
        returned = self._leash.hold(self._loop)
        draining = asyncio.ensure_future(self._call("POST", _DRAIN))
        either: set[asyncio.Future[Any]] = {returned, draining}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not returned.done():
            raise AssertionError("no handler returned, so there was nothing to crash after")
        await self._crash()
        await asyncio.gather(draining, return_exceptions=True)
        await self._drain()
        return delivered

    async def _calls(
        self, method: str, path: str, body: bytes | str, headers: Mapping[str, str] | None
    ) -> httpx.Response:
        answer = await self._life.stranger.request(method, path, content=body, headers=headers)
        await self._drain()
        return answer

    async def _submitted(self, event: Event) -> tuple[Delivered, Emulated | None]:
        """Submit the prediction of an event; None where it ended without its provider."""
        prediction = event.prediction
        code = prediction.error.code if prediction.error else None
        self._providers.faults.replace(refusals_of(prediction))
        body = {
            "provider": prediction.provider,
            "model": prediction.model,
            "input": prediction.input,
            "metadata": prediction.metadata,
            "reply_to": prediction.reply_to,
        }
        found = msgspec.json.decode(
            await self._call("POST", "/v1/predictions", content=msgspec.json.encode(body)),
            type=Prediction,
        )
        delivered = Delivered(self, found.id)
        if code in {"expired", "unconfirmed"}:
            self.clock.move(float(self._settings.get("RECEIVER_PREDICTION_TIMEOUT", "3600")) + 1)
            return delivered, None
        if found.provider_id is None:
            return delivered, None
        return delivered, self._taken(found.provider_id)

    def _taken(self, provider_id: str) -> Emulated:
        taken = self._providers.find(provider_id)
        if taken is None:
            raise AssertionError("no provider has taken it")
        return taken

    def _finish_there(self, taken: Emulated, event: Event | None) -> None:
        """End it at its provider, which tells nobody; without an event, with pictures."""
        if event is not None and event.type == "prediction.canceled":
            self._providers.cancel(taken)
        else:
            self._providers.end(taken, ending_of(event) if event else Ending())

    async def _tell(
        self, taken: Emulated, event: Event | None, prediction_id: str, times: int
    ) -> None:
        if event is not None and event.type == "prediction.canceled":
            await self._call("POST", f"/v1/predictions/{prediction_id}/cancel")
            await self._poll(prediction_id)
            return
        self._finish_there(taken, event)
        if not taken.callback_url:
            for _ in range(times):
                self._providers.broadcast(taken)
            if not await self._has_ended(prediction_id, wait=int(PATIENCE)):
                raise AssertionError("the stream was not heard")
            return
        url, content = taken.callback_url, self._providers.callback(taken)
        headers = self._providers.headers(taken, content)
        for _ in range(times):
            answer = await self._life.stranger.post(url, content=content, headers=headers)
            if answer.status_code != httpx.codes.OK:
                raise AssertionError(f"the callback was answered {answer.status_code}")

    async def _poll(self, prediction_id: str) -> None:
        for _ in range(_MOST_MOVES):
            if await self._has_ended(prediction_id):
                return
            self.clock.move(60.0)
            await self._drain()
        raise AssertionError("polling did not find the outcome")

    async def _has_ended(self, prediction_id: str, wait: int = 0) -> bool:
        headers = {"prefer": f"wait={wait}"} if wait else {}
        content = await self._call("GET", f"/v1/predictions/{prediction_id}", headers=headers)
        return msgspec.json.decode(content, type=Prediction).status in TERMINAL

    async def _post_and_drain(self, path: str) -> None:
        await self._call("POST", path)
        await self._drain()

    async def _drain(self) -> None:
        """Run what is due, and what that makes due."""
        await self._call("POST", _DRAIN)

    async def _call(self, method: str, path: str, **more: Any) -> bytes:
        answer = await self._life.caller.request(method, path, **more)
        if not answer.is_success:
            raise AssertionError(f"{method} {path} was answered {answer.text}")
        return answer.content

    async def _begin(self) -> _Life:
        self._lives += 1
        url = f"sqlite:///{self._database()}"
        app = create_app(
            Settings.read({**self._settings, "RECEIVER_DATABASE_URL": url}),
            self._handlers,
            dispatch=False,
            clock=self.clock,
            transport=self._providers,
            http=self._http,
            results=self._results,
        )
        life = _Life(app)
        await life.start()
        if self._chats is not None:
            self._chats.calls(life.stranger)
        return life

    async def _crash(self) -> None:
        """Go on with what is on the disk now; what the old one still does is lost on it."""
        old, before = self._life, self._database()
        image = Path(self._folder.name, f"receiver{self._lives + 1}.db")
        with closing(sqlite3.connect(before)) as source, closing(sqlite3.connect(image)) as target:
            source.backup(target)
        self._life = await self._begin()
        self._leash.let_go()
        await old.stop()

    def _database(self) -> Path:
        return Path(self._folder.name, f"receiver{self._lives}.db")

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(2 * PATIENCE)


def _handlers(given: tuple[Callable[..., Any] | str, ...]) -> list[Registered]:
    """Return what files hold first, as `serve` has it, then what was registered for functions."""
    named = load([item for item in given if isinstance(item, str)]).all()
    functions = [item for item in given if not isinstance(item, str)]
    return [*named, *(one for item in functions for one in registered_of(item))]


class _Life:
    """One run of the receiver, from its start to its stop."""

    def __init__(self, app: Starlette) -> None:
        self._app = app
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        make = partial(httpx.AsyncClient, transport=httpx.ASGITransport(app))
        base = _SETTINGS["RECEIVER_PUBLIC_URL"]
        key = {"authorization": f"Bearer {_API_KEY}", "content-type": "application/json"}
        self.caller = make(base_url=base, headers=key, timeout=PATIENCE)
        self.stranger = make(base_url=base)

    async def start(self) -> None:
        """Return when it serves; raise what keeps it from that."""
        ready = asyncio.Event()
        self._task = asyncio.create_task(self._run(ready))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({self._task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if self._task.done():
            waiting.cancel()
            await self._task

    async def _run(self, ready: asyncio.Event) -> None:
        async with self._app.router.lifespan_context(self._app), self.caller, self.stranger:
            ready.set()
            await self._stop.wait()

    async def stop(self) -> None:
        self._stop.set()
        if self._task is not None:
            await self._task


class _Leash:
    """Holds handlers back when they have returned, as long as it is told to."""

    def __init__(self) -> None:
        self._held: Future[None] | None = None
        self._returned: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def on(self, handler: Handler) -> Handler:
        function = handler.function

        async def on_loop(*arguments: Any) -> Any:
            result = await function(*arguments)
            if (held := self._tell()) is not None:
                await asyncio.wrap_future(held)
            return result

        def in_thread(*arguments: Any) -> Any:
            result = function(*arguments)
            if (held := self._tell()) is not None:
                held.result()
            return result

        return replace(handler, function=on_loop if handler.is_async else in_thread)

    def hold(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """Hold handlers that return from now on; return what is done when one has."""
        self._loop = loop
        self._held = Future()
        self._returned = loop.create_future()
        return self._returned

    def let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.set_result(None)

    def _tell(self) -> Future[None] | None:
        if self._held is None or self._loop is None or self._returned is None:
            return None
        self._loop.call_soon_threadsafe(_done, self._returned)
        return self._held


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
