"""HTTP/1.1 connections with bounds on size and time, as uvicorn's protocol class."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NoReturn

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from receiver.http.problems import problem_body
from receiver.http.request_log import IS_GONE
from receiver.model.errors import Problem

_LARGEST_HEAD: Final = 64 * 1024
_MOST_HEADERS: Final = 100
_LONGEST_URL: Final = 8 * 1024
_SLOWEST_HEAD: Final = 20.0
"""Seconds a request's line and headers may take, and a connection may be silent at first."""
_SLOWEST_REST: Final = 5.0
"""Seconds in which the rest of a request may come that was answered before its end: to close the
connection at once would reset it, and the client might lose the answer."""
_MOST_DISCARDED: Final = 64 * 1024 * 1024
"""Bytes of that rest that are read and dropped."""
_PEER_CHECK: Final = 1.0
"""Seconds between two checks whether a half-closed client is still there."""
_LEAST_TIME: Final = 1.0
"""Seconds that each connection has, also where too many are waiting."""
_REFUSALS: Final = {
    400: ("invalid-request", "this is not an HTTP/1.1 request, or asks for a proxy"),
    414: ("uri-too-long", f"the URL has more than {_LONGEST_URL} bytes"),
    431: (
        "headers-too-large",
        f"there are more than {_MOST_HEADERS} headers, or more than {_LARGEST_HEAD} bytes of them",
    ),
}
_MOST_HELD: Final = 64 * 1024
"""Bytes of an answer that are buffered for one system call."""
_SLOWEST_READ: Final = 20.0
"""Seconds in which a client must read at least some (tens of KB) of its answer."""


class WaitingConnections:
    """The connections that we wait for bytes from, oldest first, and a limit on their number.

    Above the limit the oldest is closed, but none in its first second, up to twice the limit:
    providers deliver in bursts, and each callback of a burst needs no longer. There is no limit by
    address: a burst has one address, and so has everything that comes through a proxy.
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
            oldest, since = next(iter(self._since.items()))
            if now - since > _LEAST_TIME or len(self._since) > 2 * self._most:
                oldest.close_now()

    def drop(self, connection: Protocol) -> None:
        self._since.pop(connection, None)


class _Refused(Exception):
    """Ends a request whose line or headers are refused."""


class _Transport:
    """A transport that buffers writes until the end of the loop's turn, and closes as we do.

    An answer's head and body are sent by one system call: a second one would cost more than most of
    what makes the answer. `close` is the protocol's `close_lingering`.
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
            if not self._transport.is_closing():  # else nobody would read it
                self._transport.write(held)

    def is_closing(self) -> bool:
        return self._protocol.is_lingering or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    """HTTP/1.1 with the limits that uvicorn does not set.

    What a request has beside its body (line, headers, trailers, chunk framing) is limited in size
    and number. Its head is limited in time, and so is the rest of a request that was answered
    before its end. Bodies are timed where they are read. A client that does not read its answer is
    disconnected.

    Requests are answered in order. When no further one can come (the client half-closed the
    connection, or sent something that is not HTTP), the earlier ones are still answered before the
    connection is closed.
    """

    def __init__(self, *given: Any, waiting: WaitingConnections, **more: Any) -> None:
        super().__init__(*given, **more)
        self._waiting = waiting
        self._raw: asyncio.Transport
        """The transport of the event loop."""
        self._answers: _Transport
        """Where answers are written; the same transport, buffered."""
        self._overhead = 0
        """Bytes of this request beside its body, less the length of the body read so far."""
        self._discarded = 0
        """Bytes that came after the answer, or after the last request."""
        self._in_head = True
        """The line and headers of the next request have not come in full."""
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
        """The status for a client that sent no request, or part of one; None: no answer."""
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._peer_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._raw = transport
        self._answers = _Transport(transport, self)
        super().connection_made(self._answers)  # type: ignore[arg-type] # is like one
        self._start_read_timer(_SLOWEST_HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        self._stop_write_timer()
        self._unset_keepalive_if_required()
        if self._peer_timer is not None:
            self._peer_timer.cancel()
        self._waiting.drop(self)
        for cycle in self._unanswered:  # uvicorn sets this for the last one only
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._no_more_requests:
            self._discarded += len(data)
        else:
            self._overhead += len(data)
            try:
                self._feed(memoryview(data))
            except httptools.HttpParserError:
                self._end_requests(self._refusal)
        if self._discarded > _MOST_DISCARDED:
            self.close_now()
        elif self._no_more_requests:
            return
        elif self._overhead > _LARGEST_HEAD or len(self.headers or ()) > _MOST_HEADERS:
            # Within the head there is still an answer to it.
            self._end_requests(431 if self._in_head and self._in_request else None)
        elif self._in_head and self._read_timer is None:
            self._start_read_timer(_SLOWEST_HEAD)

    def _feed(self, data: memoryview) -> None:
        """Parse what came; an offer to upgrade is ignored, and its request handled like any other.

        The parser ends such a request after its head, whatever body follows. So a new parser gets
        the head once more without the offer, and goes on from there.
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
        self._check_peer()
        return True

    def _check_peer(self) -> None:
        """Check now and then whether a half-closed client is still there.

        The event loop reports no reset once the input has ended.
        """
        if self._raw.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._raw.abort()
        else:
            self._peer_timer = self.loop.call_later(_PEER_CHECK, self._check_peer)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._in_request = True
        self._waiting.add(self)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":  # it needs the tunnel
                raise _Refused
            return  # it is parsed again, without the offer
        self._stop_read_timer()
        if len(self.url) > _LONGEST_URL:
            self._refuse(414)
        size = hosts = 0
        for name, value in self.headers:
            size += len(name) + len(value)
            hosts += name == b"host"
            if name == b"transfer-encoding" and value.lower() != b"chunked":
                raise _Refused  # the parser takes "gzip, chunked", and leaves it compressed
        if len(self.headers) > _MOST_HEADERS or size > _LARGEST_HEAD:
            self._refuse(431)
        is_old = self.parser.get_http_version() == "1.0"
        if hosts > 1 or (not hosts and not is_old):
            raise _Refused  # as RFC 9112, 3.2, wants
        if is_old:
            self.expect_100_continue = False  # which HTTP/1.0 does not know
        super().on_headers_complete()
        self._in_head = False
        self.headers = []  # trailers come here next, and are not given to the app
        cycle = self.cycle
        if is_old:
            cycle.send = partial(_send_unchunked, cycle, cycle.send)  # type: ignore[method-assign]
        self.scope["extensions"] = {IS_GONE: lambda: cycle.disconnected}  # type: ignore[dict-item]
        self._unanswered.append(cycle)

    def _refuse(self, status: int) -> NoReturn:
        self._refusal = status
        raise _Refused

    def on_body(self, body: bytes) -> None:
        self._overhead -= 2 * len(body)
        if self.cycle.response_complete:
            self._discarded += len(body)
        super().on_body(body)

    def pause_writing(self) -> None:
        """Disconnect the client unless it reads more of its answer within a while."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(_SLOWEST_READ, self._raw.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._in_request = False
        self._overhead = self._discarded = 0
        self._waiting.drop(self)
        if self.cycle.keep_alive and not self.parser.should_keep_alive():
            self._end_requests(None)  # by a trailer: the parser takes no further request
        elif self.cycle.response_complete:  # and uvicorn's time limit on the next one is over
            self._in_head = True
            self._start_read_timer(_SLOWEST_HEAD)

    def on_response_complete(self) -> None:
        self._answers.flush()  # now, as something later in this turn may block the loop
        self._unanswered.popleft()
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._no_more_requests:
            self._close_when_answered()
        elif not self.cycle.response_complete:
            return  # the next request is under way already
        elif self._in_request:
            self._start_read_timer(_SLOWEST_REST)
        else:
            self._in_head = True
            self._waiting.add(self)  # as long as uvicorn lets a connection be idle

    def _end_requests(self, refusal: int | None) -> None:
        """Take no further request; answer the complete ones, then refuse the incomplete one."""
        self._no_more_requests = True
        self._stop_read_timer()
        self._waiting.drop(self)
        self._refusal = refusal
        if self._in_request and not self._in_head:
            if self.cycle.response_started:
                self._refusal = None
            self._disconnect_last()
        self._close_when_answered()

    def _disconnect_last(self) -> None:
        """Disconnect the last request from the app, as the rest of it will not come."""
        if self.cycle.response_complete:
            return
        self._unanswered.pop()
        if self.pipeline and self.pipeline[0][0] is self.cycle:
            self.pipeline.popleft()
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def _close_when_answered(self) -> None:
        """Close the connection once every complete request is answered."""
        if self._unanswered:
            return
        if self._refusal is not None:
            kind, why = _REFUSALS[self._refusal]
            body = problem_body(Problem(self._refusal, kind, why))
            head = (
                STATUS_LINE[self._refusal] + b"content-type: application/problem+json\r\n"
                b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            )
            self._answers.write(head + body)
        self.close_lingering()

    def close_lingering(self) -> None:
        """Close the connection so that the client receives the last answer.

        If it is still sending, a plain close would reset the connection, and a reset may destroy
        the answer on its way. So what comes is read and dropped for a while (RFC 9112, 9.6).
        """
        if self.transport.is_closing():
            return
        if self._at_eof or not (self._no_more_requests or self._in_request):
            self.close_now()
            return
        if self._in_request and not self._no_more_requests:
            self._disconnect_last()
        self.is_lingering = self._no_more_requests = True
        self._answers.flush()
        self._raw.write_eof()
        self.flow.resume_reading()
        self._start_read_timer(_SLOWEST_REST)

    def shutdown(self) -> None:
        """Close the connection as the server stops, at once if no answer is under way."""
        if self.is_lingering or not self._unanswered:
            self.close_now()
        else:
            super().shutdown()

    def close_now(self) -> None:
        """Close the connection at once; what was written is still sent."""
        self._stop_read_timer()
        self._waiting.drop(self)
        self._answers.flush()
        self._raw.close()

    def _start_read_timer(self, seconds: float) -> None:
        self._stop_read_timer()
        self._read_timer = self.loop.call_later(seconds, self.close_now)
        self._waiting.add(self)

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None


async def _send_unchunked(
    cycle: RequestResponseCycle, send: Callable[[Any], Awaitable[None]], message: Any
) -> None:
    """Send a message of an answer to HTTP/1.0; without a length, its end is that of the connection.

    uvicorn would send it in chunks, which only HTTP/1.1 knows.
    """
    if not cycle.response_started:
        if all(name.lower() != b"content-length" for name, _ in message.get("headers", ())):
            cycle.chunked_encoding = False
    elif not cycle.expected_content_length:
        cycle.expected_content_length = len(message.get("body", b""))
    await send(message)


def _most_waiting() -> int:
    """Return the limit on waiting connections: a quarter of the files that we may open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(1000, soft // 4) if soft > 0 else 1000


def protocol() -> Callable[..., Protocol]:
    """Return a factory of protocols for the connections of one server."""
    return partial(Protocol, waiting=WaitingConnections(_most_waiting()))
