"""Run an ASGI app under uvicorn, and end within seconds whatever its tasks do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from types import FrameType
from typing import Any, Final, NoReturn, TypeVar

import httptools
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from receiver.deliveries import containment
from receiver.http.problems import problem_body
from receiver.http.request_log import IS_GONE
from receiver.observability import logging as logs

T = TypeVar("T")

_STOP: Final = 2
"""Seconds that open requests get to end when we stop; handlers get their own time after that."""
_LATER: Final = 0.3
"""Seconds by which the system ends us later than we would."""
LONGEST_STOP: Final = 9.5
"""Seconds after which we end whatever hangs: what is stored is left to the next start."""
_LARGEST_HEAD: Final = 64 * 1024
_MOST_HEADERS: Final = 100
_LONGEST_URL: Final = 8 * 1024
_SLOWEST_HEAD: Final = 20.0
"""Seconds a request's line and headers may take, and a connection may be silent at first."""
_UNHEARD: Final = 5.0
"""Seconds for the rest of a request that was answered already: a reset would lose the answer."""
_MOST_DISCARDED: Final = 64 * 1024 * 1024
"""Bytes of it that are dropped in that time."""
_WATCH_EVERY: Final = 1.0
_KEEP_ALIVE: Final = 620
"""Seconds a connection may be idle between requests: longer than any proxy keeps it before us, or
the proxy's next request could meet our close. Google's load balancer has the longest, 600."""
_LEAST_PATIENCE: Final = 1.0
"""Seconds that even a crowd leaves each connection."""
_REFUSALS: Final = {
    400: ("invalid-request", "this is not an HTTP/1.1 request, or asks for a proxy"),
    414: ("uri-too-long", f"the URL has more than {_LONGEST_URL} bytes"),
    431: (
        "headers-too-large",
        f"there are more than {_MOST_HEADERS} headers, or more than {_LARGEST_HEAD} bytes of them",
    ),
}
_MOST_HELD: Final = 64 * 1024
"""Bytes of an answer that wait for more of it."""
_SLOWEST_READ: Final = 20.0
"""Seconds in which the reader of an answer must take at least some of it (tens of KB)."""
_LOOK: Final = 0.5
"""Seconds between two looks whether signals still reach us, and the loop is as it was."""
LINGER: Final = 1.0
"""Seconds after everything is stored in which stubborn tasks may still end by themselves."""


class Waited:
    """The connections from which bytes are awaited, longest first, and a bound on their number.

    Where there are too many the one that takes longest is closed, but none in its first second
    while that can be helped: providers deliver in bursts, and each of a burst needs only that long.
    Addresses do not matter: all of a burst have the same, and all who come by one proxy.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._since: OrderedDict[Protocol, float] = OrderedDict()

    def add(self, connection: Protocol) -> None:
        now = self._clock()
        self._since[connection] = now
        self._since.move_to_end(connection)
        if len(self._since) > self._most:
            slowest, since = next(iter(self._since.items()))
            if now - since > _LEAST_PATIENCE or len(self._since) > 2 * self._most:
                slowest.give_up()

    def drop(self, connection: Protocol) -> None:
        self._since.pop(connection, None)


class _Refused(Exception):
    """Ends a request whose head is too much."""


class _Transport:
    """A transport as uvicorn has it, but for its end: the protocol decides how to close it.

    An answer's head waits for its body, to the end of this turn of the loop at most: both are sent
    by one call of the system, which is dearer than most of what makes the answer.
    """

    def __init__(self, transport: asyncio.Transport, protocol: Protocol) -> None:
        self._transport = transport
        self._held = bytearray()
        self.close = protocol.close_lingering
        self._protocol = protocol

    def write(self, data: bytes) -> None:
        if not self._held:
            self._protocol.loop.call_soon(self.flush)
        self._held += data
        if len(self._held) > _MOST_HELD:
            self.flush()

    def flush(self) -> None:
        """Send what was written."""
        if self._held:
            held, self._held = self._held, bytearray()
            if not self._transport.is_closing():  # else nobody is there to read it
                self._transport.write(held)

    def is_closing(self) -> bool:
        return self._protocol.is_lingering or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    """HTTP with bounds on what uvicorn lets be endless.

    What comes with a request beside its body (line, headers, trailers, what frames its chunks) is
    bounded in size and number; its head is bounded in time, and so is what follows an answer that
    did not wait for the end of the request. Bodies are timed where they are read. A client that
    does not read its answer is cut off.

    Requests are answered in their order. Where no further one can come (the client half-closed the
    connection, or sent what is no HTTP), those before it are still answered, and then it is closed.
    """

    def __init__(self, *given: Any, waited: Waited, **more: Any) -> None:
        super().__init__(*given, **more)
        self._waited = waited
        self._wire: asyncio.Transport
        """The transport itself."""
        self._answers: _Transport
        """What answers are written to."""
        self._beside = 0
        """Bytes of this request beside its body, which earns it as many more as it has itself."""
        self._discarded = 0
        """Bytes that came after the answer, or after the last request."""
        self._in_head = True
        """Its line and headers are awaited, or under way."""
        self._in_request = False
        self._unanswered: deque[RequestResponseCycle] = deque()
        """Requests whose answers are not complete; the first is being answered."""
        self._no_more_requests = False
        """There will be no further request."""
        self._at_eof = False
        """There will be no further bytes."""
        self.is_lingering = False
        """The last answer is written; what still comes is dropped, for a while."""
        self._refusal: int | None = 400
        """What is said in the end to a client that sent no request, or half of one."""
        self._patience: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._watch_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._wire = transport
        self._answers = _Transport(transport, self)
        super().connection_made(self._answers)  # type: ignore[arg-type] # is like one
        self._await_bytes(_SLOWEST_HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_patience()
        self._stop_unread()
        self._unset_keepalive_if_required()
        if self._watch_timer is not None:
            self._watch_timer.cancel()
        self._waited.drop(self)
        for cycle in self._unanswered:  # uvicorn tells the last one only
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._no_more_requests:
            self._discarded += len(data)
        else:
            self._beside += len(data)
            try:
                self._feed(memoryview(data))
            except httptools.HttpParserError:
                self._end_requests(self._refusal)
        if self._discarded > _MOST_DISCARDED:
            self.give_up()
        elif self._no_more_requests:
            return
        elif self._beside > _LARGEST_HEAD or len(self.headers or ()) > _MOST_HEADERS:
            # In its head that can still be said.
            self._end_requests(431 if self._in_head and self._in_request else None)
        elif self._in_head and self._patience is None:
            self._await_bytes(_SLOWEST_HEAD)

    def _feed(self, data: memoryview) -> None:
        """Parse what came; an offer to upgrade is not taken, so its request is one like others.

        The parser ends the message with the head of such a request, whatever body follows. A new
        one gets the head once more without the offer, and goes on from there.
        """
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                data = data[offer.args[0] :]
            else:
                return
            version = self.parser.get_http_version().encode()
            line = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)
            kept = [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            self.parser.feed_data(b"\r\n".join([line, *kept, b"", b""]))

    def eof_received(self) -> bool:  # type: ignore[override] # uvicorn closes in any case
        """Handle the end of what the client sends; it may still read."""
        self._at_eof = True
        if not self._no_more_requests:
            self._end_requests(None)
        if not self._unanswered or self.is_lingering:
            return False
        self._watch()
        return True

    def _watch(self) -> None:
        """Look now and then whether a client that has said all is still there.

        No loop tells of a reset once the input has ended.
        """
        if self._wire.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._wire.abort()
        else:
            self._watch_timer = self.loop.call_later(_WATCH_EVERY, self._watch)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._in_request = True
        self._waited.add(self)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":  # no offer: nothing but a tunnel would do
                raise _Refused
            return  # it comes again, without the offer
        self._end_patience()
        if len(self.url) > _LONGEST_URL:
            self._refuse(414)
        size = 0
        for name, value in self.headers:
            size += len(name) + len(value)
            if name == b"transfer-encoding" and value.lower() != b"chunked":
                raise _Refused  # the parser takes "gzip, chunked", and leaves it zipped
        if len(self.headers) > _MOST_HEADERS or size > _LARGEST_HEAD:
            self._refuse(431)
        if self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # which HTTP/1.0 does not know
        super().on_headers_complete()
        self._in_head = False
        self.headers = []  # trailers are not the app's: a proxy adds what it knows before them
        cycle = self.cycle
        self.scope["extensions"] = {IS_GONE: lambda: cycle.disconnected}  # type: ignore[dict-item]
        self._unanswered.append(cycle)

    def _refuse(self, status: int) -> NoReturn:
        self._refusal = status
        raise _Refused

    def on_body(self, body: bytes) -> None:
        self._beside -= 2 * len(body)
        if self.cycle.response_complete:
            self._discarded += len(body)
        super().on_body(body)

    def pause_writing(self) -> None:
        """Begin to wait for a reader that takes too little; it is cut off after a while."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(_SLOWEST_READ, self._wire.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_unread()

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._in_request = False
        self._beside = self._discarded = 0
        self._waited.drop(self)
        if self.cycle.keep_alive and not self.parser.should_keep_alive():
            self._end_requests(None)  # by a trailer: the parser takes no further request
        elif self.cycle.response_complete:  # and uvicorn's patience with the next one has ended
            self._in_head = True
            self._await_bytes(_SLOWEST_HEAD)

    def on_response_complete(self) -> None:
        self._answers.flush()  # now, as the next in this turn may be a handler that blocks the loop
        self._unanswered.popleft()
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._no_more_requests:
            self._close_when_answered()
        elif not self.cycle.response_complete:
            return  # the next request is under way already
        elif self._in_request:
            self._await_bytes(_UNHEARD)
        else:
            self._in_head = True
            self._waited.add(self)  # as long as uvicorn lets a connection be idle

    def _end_requests(self, refusal: int | None) -> None:
        """Take no further request; answer those that came whole, then refuse what did not."""
        self._no_more_requests = True
        self._end_patience()
        self._waited.drop(self)
        self._refusal = refusal
        if self._in_request and not self._in_head:
            if self.cycle.response_started:
                self._refusal = None
            self._abandon()
        self._close_when_answered()

    def _abandon(self) -> None:
        """Let go of the last request, as the rest of it will not come."""
        if self.cycle.response_complete:
            return
        self._unanswered.pop()
        if self.pipeline and self.pipeline[0][0] is self.cycle:
            self.pipeline.popleft()
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def _close_when_answered(self) -> None:
        """Close the connection, once everything before the end of its input is answered."""
        if self._unanswered:
            return
        if self._refusal is not None:
            kind, why = _REFUSALS[self._refusal]
            body = problem_body(self._refusal, kind, why)
            head = (
                STATUS_LINE[self._refusal] + b"content-type: application/problem+json\r\n"
                b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            )
            self._answers.write(head + body)
        self.close_lingering()

    def close_lingering(self) -> None:
        """Close the connection so that the client hears what was said to it last.

        Where it is still sending, a plain close would reset the connection, and a reset may destroy
        the answer on its way. So what comes is dropped, for a while (RFC 9112, 9.6).
        """
        if self.transport.is_closing():
            return
        if self._at_eof or not (self._no_more_requests or self._in_request):
            self.give_up()
            return
        if self._in_request and not self._no_more_requests:
            self._abandon()
        self.is_lingering = self._no_more_requests = True
        self._answers.flush()
        self._wire.write_eof()
        self.flow.resume_reading()
        self._await_bytes(_UNHEARD)

    def shutdown(self) -> None:
        """End at once what waits for nothing but more bytes, as the server stops."""
        if self.is_lingering or not self._unanswered:
            self.give_up()
        else:
            super().shutdown()

    def give_up(self) -> None:
        """Close the connection; what was written is still sent."""
        self._end_patience()
        self._waited.drop(self)
        self._answers.flush()
        self._wire.close()

    def _await_bytes(self, seconds: float) -> None:
        self._end_patience()
        self._patience = self.loop.call_later(seconds, self.give_up)
        self._waited.add(self)

    def _end_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def _most_waited() -> int:
    """Leave three quarters of the files that we may open for what is not waited for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(1000, soft // 4) if soft > 0 else 1000


def protocol() -> Callable[..., Protocol]:
    """Make what serves the connections of one server."""
    return partial(Protocol, waited=Waited(_most_waited()))


class Server(uvicorn.Server):
    """A uvicorn server that answers waiting callers before it stops, and then really stops."""

    def __init__(self, app: Starlette, host: str, port: int, *, leave: bool = True) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=protocol(),  # type: ignore[arg-type] # a class is only called
                log_config=None,
                access_log=False,
                proxy_headers=False,  # the app does it, by RECEIVER_TRUSTED_PROXIES
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=_STOP,
                ws="none",
                lifespan="on",
            )
        )
        self._release: Callable[[], Any] = getattr(app.state, "release", lambda: None)
        self._leave = leave
        app.state.stopped = self._stopped

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        if not self._leave:
            super().run(sockets)
            return
        factory = self.config.get_loop_factory()
        run(self.serve(sockets), asyncio.new_event_loop() if factory is None else factory())

    async def _serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super()._serve(sockets)
        finally:
            if self._leave:
                logs.flush()  # what follows may be the signal once more, which ends us at once

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal; the loop that should act on it may be stuck."""
        LIMIT.arm()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._leave:
            keep_signals(self.handle_exit)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._release()
        if self._leave:
            LIMIT.arm()
        await super().shutdown(sockets)

    def _stopped(self) -> None:
        """Exit soon, now that the store is closed, whatever brought us there.

        A handler that swallows its cancellation would keep the loop, and so the process, for ever.
        """
        if self._leave:
            exit_after(LINGER, 0 if self.should_exit else 1)


class _Limit:
    """Ends this process a while after it was armed, whatever its loop and its tasks do."""

    def __init__(self) -> None:
        self._armed = threading.Lock()
        self._watches = False

    def watch(self) -> None:
        """Begin to wait: no thread can be started in a signal handler, where it is armed."""
        if not self._watches:
            self._watches = True
            self._armed.acquire()
            threading.Thread(target=self._end, name="receiver-limit", daemon=True).start()

    def arm(self) -> None:
        """Begin to count; the system does so too, as code in C may let no thread of ours run."""
        try:
            self._armed.release()
        except RuntimeError:  # armed already, or not watched
            return
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, LONGEST_STOP + _LATER)

    def _end(self) -> None:
        self._armed.acquire()
        time.sleep(LONGEST_STOP)
        _end(1)


LIMIT: Final = _Limit()


def run(main: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    """Run a program to its end, and within seconds of the moment when it should have ended."""
    LIMIT.watch()

    async def limited() -> T:
        try:
            return await main
        finally:
            LIMIT.arm()

    return containment.run(limited(), loop)


def keep_signals(stop: Callable[[int, FrameType | None], Any]) -> None:
    """Make the signals that stop us do so, also when a handler has set others in their place."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != stop:
            signal.signal(number, stop)


@asynccontextmanager
async def told_to_stop() -> AsyncIterator[asyncio.Event]:
    """Return what is set when a signal tells us to stop."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(_number: int, _frame: FrameType | None) -> None:
        LIMIT.arm()  # the loop may be stuck
        loop.call_soon_threadsafe(stopping.set)

    async def keep() -> None:
        while True:
            keep_signals(stop)
            await asyncio.sleep(_LOOK)

    keeping = asyncio.create_task(keep())
    try:
        yield stopping
    finally:
        keeping.cancel()


def exit_after(seconds: float, code: int) -> None:
    """End this process then, whatever its tasks do."""
    timer = threading.Timer(seconds, _end, (code,))
    timer.daemon = True
    timer.start()


def _end(code: int) -> None:
    """End this process at once, but for its last lines."""
    logs.flush()
    os._exit(code)
