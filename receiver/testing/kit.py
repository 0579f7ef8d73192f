"""A whole receiver in a test: the real app, a temporary database, and emulated providers."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import closing
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar
from unittest.mock import patch

import httpx
import msgspec

from receiver.app import create_app
from receiver.deliveries.handlers import Handler
from receiver.deliveries.importing import load
from receiver.deliveries.registry import Registered, registered_of
from receiver.emulator.chats.board import Message, Platform
from receiver.emulator.chats.calling import Exchange
from receiver.emulator.chats.platforms import Chats
from receiver.emulator.endings import Ending
from receiver.emulator.inprocess import EmulatedChats, EmulatedProviders
from receiver.emulator.ledger import Prediction as Emulated
from receiver.model.answers import Page
from receiver.model.states import TERMINAL
from receiver.model.tasks import start_thread
from receiver.model.values import Event, Prediction, Status
from receiver.settings import Settings
from receiver.testing.chat import SETTINGS as CHAT_SETTINGS
from receiver.testing.chat import ChatEdge, Said, button_of, emulated_chats
from receiver.testing.delivered import Delivered
from receiver.testing.edge import Answer, responding, serving_files
from receiver.testing.life import API_KEY, PATIENCE, URL, Clock, Life, ReturnHold
from receiver.testing.providers import SETTINGS, ending_of, refusals_of

P = ParamSpec("P")
T = TypeVar("T")

_SETTINGS: Final = {
    **SETTINGS,
    "RECEIVER_SECRET_KEY": "the-secret-key-of-nothing-but-a-test",
    "RECEIVER_API_KEYS": API_KEY,
    "RECEIVER_PUBLIC_URL": URL,
}
_MAX_STEPS: Final = 100
_POLL_SECONDS: Final = 0.005
"""Seconds between two reads of a prediction that is being submitted."""
_DRAIN: Final = "/v1/drain?seconds=60"


def blocking(
    work: Callable[Concatenate[Kit, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Kit, P], T]:
    """Return a method that blocks while the kit's own loop runs the work."""

    @wraps(work)
    def do(kit: Kit, /, *given: P.args, **named: P.kwargs) -> T:
        return kit.do(work(kit, *given, **named))

    return do


class Kit:
    """A receiver that runs handlers step by step: only what a test asks for happens.

    `handlers` are decorated functions, or names as `receiver serve` takes them. `http` answers the
    requests of `ctx.http`, and `files` has the contents for `ctx.fetch`, by URL, and answers
    `ctx.guarded` too; `online` lets all use the network instead, this machine included. `settings`
    are environment variables of the receiver, and of handlers given by name. With `chats`, Slack,
    Discord and Telegram are emulated, and handlers given by name find their accounts in the
    environment: `says` and `presses` act as people in the chats.
    All methods block, and raise AssertionError if the expected does not happen.
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
        self._hold = ReturnHold()
        # Handlers read the environment as they are loaded.
        with patch.dict(os.environ, {**(CHAT_SETTINGS if chats else {}), **(settings or {})}):
            self._handlers = [
                self._hold.on(one) if isinstance(one, Handler) else one
                for one in _handlers(handlers)
            ]
        self._http = None if online else responding(http)
        self._results = None if online else serving_files(files or {})
        self._folder = tempfile.TemporaryDirectory(prefix="receiver-kit-")
        private = {"RECEIVER_ALLOW_PRIVATE_FETCH": "1"} if online else {}
        self._settings = {**_SETTINGS, **private, **(settings or {})}
        self._providers = EmulatedProviders(self.clock)
        self._chats = self._emulate_chats() if chats else None
        self._lives = 0
        self._loop = asyncio.new_event_loop()
        self._thread = start_thread("receiver-kit", self._loop.run_forever)
        try:
            self._life = self.do(self._begin())
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
            self.do(self._life.stop())
        finally:
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()
        self._folder.cleanup()

    @property
    def answers(self) -> bool:
        """Whether it can be asked: not after `close`, and not by its own loop's thread."""
        return self._loop.is_running() and threading.current_thread() is not self._thread

    # --- events, calls and chats ---

    @blocking
    async def deliver(self, event: Event, times: int = 1) -> Delivered:
        """Submit the event's prediction, let it end as in the event, and run due deliveries.

        The provider reports the end `times` times: by callback, or on its stream (Oxen.ai). The
        event that handlers receive has its own ids and times.
        """
        delivered = await self._submit_and_end(event, times)
        await self._drain()
        return delivered

    @blocking
    async def lose_callback(self, event: Event) -> Delivered:
        """End the prediction without its callback; then move the clock until a poll finds it."""
        delivered, emulated = await self._submit(event)
        if emulated is None:
            raise AssertionError("the provider took nothing, so there is no callback to lose")
        self._end_at_provider(emulated, event)
        await self._poll(delivered.prediction_id)
        await self._drain()  # the receiver may have polled outside the drain
        return delivered

    @blocking
    async def crash_after_ack(self, event: Event) -> Delivered:
        """Kill the receiver after its 2xx and before any handler runs; then start it again."""
        delivered = await self._submit_and_end(event)
        await self._crash()
        await self._drain()
        return delivered

    @blocking
    async def crash_after_run(self, event: Event) -> Delivered:
        """Kill the receiver after a handler has returned and before that is stored; start it again.

        The handler's effects remain, and it runs once more.
        """
        delivered = await self._submit_and_end(event)
        returned = self._hold.hold(self._loop)
        draining = asyncio.ensure_future(self._call("POST", _DRAIN))
        either: set[asyncio.Future[Any]] = {returned, draining}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not returned.done():
            raise AssertionError("no handler returned, so there was nothing to crash after")
        await self._crash()
        await asyncio.gather(draining, return_exceptions=True)
        await self._drain()
        return delivered

    @blocking
    async def calls(
        self,
        path: str,
        body: bytes | str = b"",
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
    ) -> httpx.Response:
        """Call a plugin's route, such as `/in/shop`, without a key; then run due work."""
        answer = await self._life.anonymous.request(method, path, content=body, headers=headers)
        await self._drain()
        return answer

    @blocking
    async def replay(self, delivered: Delivered) -> None:
        """Redeliver the event to its handlers, and run them."""
        await self._call("POST", f"/v1/predictions/{delivered.prediction_id}/replay")
        await self._drain()

    @blocking
    async def finish(self, child: Prediction, event: Event) -> Delivered:
        """End a prediction that a handler submitted, as in the event; run due deliveries."""
        if child.provider_id is None:
            child = await self._until_submitted(child.id)
        emulated = self._emulated(child.provider_id)
        await self._report_end(emulated, event, child.id, 1)
        await self._drain()
        return Delivered(self, child.id)

    @blocking
    async def move(self, seconds: float) -> None:
        """Move the clock, and run the work that is then due."""
        self.clock.move(seconds)
        await self._drain()

    def exhaust(self, delivered: Delivered) -> None:
        """Move the clock until all deliveries of an event have ended."""
        for _ in range(_MAX_STEPS):
            due = [d.due_at for d in delivered.deliveries.values() if d.due_at is not None]
            if not due:
                return
            self.move(max(datetime.fromisoformat(min(due)).timestamp() - self.clock(), 0.0) + 0.01)
        raise AssertionError(f"the deliveries did not end: {delivered.deliveries}")

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
        """Send a message in a chat; run everything that follows, until the pictures are posted.

        With `finish=False` it returns when the receiver has answered: `finish_all` does the rest.
        """
        people, given = self.chats.people[on], tuple((files or {}).items())
        work = people.says(text, person, place, files=given)
        return self.do(self._chat(on, person, work, finish=finish))

    def presses(
        self,
        message: Message,
        label: str,
        *,
        person: str = "U1",
        on: Platform | None = None,
        finish: bool = True,
    ) -> Said:
        """Press the button of that label under a message; run all that follows, as `says`.

        The platform is that of the message, unless `on` names it.
        """
        boards = self.chats.boards.items()
        there: list[Platform] = [name for name, board in boards if message in board.messages]
        platform = on or (there or ["slack"])[0]
        work = self.chats.people[platform].presses(message, button_of(message, label), person)
        return self.do(self._chat(platform, person, work, finish=finish))

    @blocking
    async def repeat(self, said: Said, times: int = 1) -> Said:
        """Repeat the platform's request `times` times at once; run all that follows."""
        exchange = said.exchange
        if exchange is None:
            raise ValueError("this message sent no request, so there is nothing to repeat")
        people, since = self.chats.people[said.board.platform], len(said.board.messages)
        again = [people.repeat(exchange, number + 1) for number in range(times)]
        exchanges = await asyncio.gather(*again)
        await self._finish_all(None)
        return Said(said.board, exchanges[-1] if exchanges else None, said.person, since)

    def finish_all(self, event: Event | None = None) -> None:
        """End all predictions, with pictures or as in the event, and run due work."""
        self.do(self._finish_all(event))

    @property
    def chats(self) -> Chats:
        """The emulated chat platforms: their messages, and `kill_tokens`."""
        if self._chats is None:
            raise ValueError("this kit has no chats: receiver_kit(…, chats=True)")
        return self._chats.chats

    def get(self, path: str, kind: type[T]) -> T:
        """Return the API's answer, decoded as `kind`."""
        return self.do(self._read(path, kind))

    # --- internals ---

    def _emulate_chats(self) -> EmulatedChats:
        """Emulate the chat platforms, and route handlers' requests and downloads to them."""
        found = emulated_chats(URL, self._settings["RECEIVER_SECRET_KEY"], self.clock)
        if self._http is not None and self._results is not None:
            self._http, self._results = (
                ChatEdge(found, others) for others in (self._http, self._results)
            )
        return found

    async def _chat(
        self,
        on: Platform,
        person: str,
        work: Coroutine[Any, Any, Exchange | None],
        *,
        finish: bool,
    ) -> Said:
        board, name = self.chats.boards[on], self.chats.name(on, person)
        since = len(board.messages)
        exchange = await work
        if exchange is not None and not exchange.is_ok:
            why = exchange.error or f"{exchange.status} {exchange.answer.decode()}"
            raise AssertionError(f"{exchange.url} was answered {why}")
        if finish:
            await self._finish_all(None)
        return Said(board, exchange, name, since)

    async def _finish_all(self, event: Event | None) -> None:
        for _ in range(_MAX_STEPS):
            await self._drain()
            # The receiver may be submitting outside the drain: that ends in a moment.
            is_coming = bool(await self._with_status("submitting"))
            working = await self._with_status("processing")
            if is_coming and not working:
                await asyncio.sleep(0.05)
            elif not working:
                return
            for prediction in working:
                emulated = self._emulated(prediction.provider_id)
                await self._report_end(emulated, event, prediction.id, 1)
        raise AssertionError("handlers submit without end")

    async def _with_status(self, status: str) -> list[Prediction]:
        path = f"/v1/predictions?status={status}&limit=100"
        return (await self._read(path, Page[Prediction])).data

    async def _submit_and_end(self, event: Event, times: int = 1) -> Delivered:
        """Submit the prediction of an event, and let its provider report the event's end."""
        delivered, emulated = await self._submit(event)
        if emulated is not None:
            await self._report_end(emulated, event, delivered.prediction_id, times)
        return delivered

    async def _submit(self, event: Event) -> tuple[Delivered, Emulated | None]:
        """Submit the prediction of an event; None if it ends without its provider."""
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
        answer = await self._call("POST", "/v1/predictions", content=msgspec.json.encode(body))
        found = msgspec.json.decode(answer, type=Prediction)
        delivered = Delivered(self, found.id)
        if code in {"expired", "unconfirmed"}:
            self.clock.move(float(self._settings.get("RECEIVER_PREDICTION_TIMEOUT", "3600")) + 1)
            return delivered, None
        if found.provider_id is None:
            return delivered, None
        return delivered, self._emulated(found.provider_id)

    def _emulated(self, provider_id: str | None) -> Emulated:
        emulated = self._providers.find(provider_id) if provider_id else None
        if emulated is None:
            raise AssertionError("no provider has taken it")
        return emulated

    def _end_at_provider(self, emulated: Emulated, event: Event | None) -> None:
        """End a prediction at its provider, without a callback; without an event, with pictures."""
        if event is not None and event.type == "prediction.canceled":
            self._providers.cancel(emulated)
        else:
            self._providers.end(emulated, ending_of(event) if event else Ending())

    async def _report_end(
        self, emulated: Emulated, event: Event | None, prediction_id: str, times: int
    ) -> None:
        if event is not None and event.type == "prediction.canceled":
            await self._call("POST", f"/v1/predictions/{prediction_id}/cancel")
            await self._poll(prediction_id)
            return
        self._end_at_provider(emulated, event)
        if not emulated.callback_url:
            for _ in range(times):
                self._providers.broadcast(emulated)
            if not await self._has_ended(prediction_id, wait=int(PATIENCE)):
                raise AssertionError("the receiver did not take the event of the stream")
            return
        url, content = emulated.callback_url, self._providers.callback(emulated)
        headers = self._providers.headers(emulated, content)
        for _ in range(times):
            answer = await self._life.anonymous.post(url, content=content, headers=headers)
            if answer.status_code != httpx.codes.OK:
                raise AssertionError(f"the callback was answered {answer.status_code}")

    async def _poll(self, prediction_id: str) -> None:
        for _ in range(_MAX_STEPS):
            if await self._has_ended(prediction_id):
                return
            self.clock.move(60.0)
            await self._drain()
        raise AssertionError("polling did not find the outcome")

    async def _until_submitted(self, prediction_id: str) -> Prediction:
        """Return a prediction once it is submitted: by a drain, or by the running submitter."""
        await self._drain()
        path, ends = f"/v1/predictions/{prediction_id}", time.monotonic() + PATIENCE
        found = await self._read(path, Prediction)
        while found.status in {Status.QUEUED, Status.SUBMITTING} and time.monotonic() < ends:
            await asyncio.sleep(_POLL_SECONDS)
            found = await self._read(path, Prediction)
        return found

    async def _has_ended(self, prediction_id: str, wait: int = 0) -> bool:
        headers = {"prefer": f"wait={wait}"} if wait else {}
        found = await self._read(f"/v1/predictions/{prediction_id}", Prediction, headers=headers)
        return found.status in TERMINAL

    async def _read(self, path: str, kind: type[T], **more: Any) -> T:
        return msgspec.json.decode(await self._call("GET", path, **more), type=kind)

    async def _drain(self) -> None:
        """Run all due work, and the work that becomes due by it."""
        await self._call("POST", _DRAIN)

    async def _call(self, method: str, path: str, **more: Any) -> bytes:
        answer = await self._life.caller.request(method, path, **more)
        if not answer.is_success:
            raise AssertionError(f"{method} {path} was answered {answer.text}")
        return answer.content

    async def _begin(self) -> Life:
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
        life = Life(app)
        await life.start()
        if self._chats is not None:
            self._chats.calls(life.anonymous)
        return life

    async def _crash(self) -> None:
        """Start a new receiver on a copy of the database; later writes of the old one are lost."""
        old, before = self._life, self._database()
        image = Path(self._folder.name, f"receiver{self._lives + 1}.db")
        with closing(sqlite3.connect(before)) as source, closing(sqlite3.connect(image)) as target:
            source.backup(target)
        self._life = await self._begin()
        self._hold.release()
        await old.stop()

    def _database(self) -> Path:
        return Path(self._folder.name, f"receiver{self._lives}.db")

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop of the receiver, and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(2 * PATIENCE)


def _handlers(given: tuple[Callable[..., Any] | str, ...]) -> list[Registered]:
    """Return the handlers of names first, as `serve` does, then those of functions."""
    named = load([item for item in given if isinstance(item, str)]).all()
    functions = [item for item in given if not isinstance(item, str)]
    return [*named, *(one for item in functions for one in registered_of(item))]
