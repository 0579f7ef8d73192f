"""The request log: ASGI middleware that writes one line for each request, however it ends.

The line has the route and the ids, but not the path, as a callback's path contains a token.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable
from itertools import count
from typing import Any, Final

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from receiver.http.access_logs import hide_token
from receiver.http.proxies import client_of
from receiver.observability.events import Telemetry

_ABOUT: Final = "receiver.about"
_UNANSWERED: Final = 499
"""nginx's status for a client that disconnects before the answer."""
_ID: Final = re.compile(r"(pred|evt|dlv)_[0-9a-z]{1,64}", re.ASCII)
_KINDS: Final = {"pred": "prediction", "evt": "event_id", "dlv": "delivery"}
_LONGEST_METHOD: Final = 16
IS_GONE: Final = "receiver.is_gone"
"""Our own server's extension of the ASGI scope: a function, whether the client is gone."""


def about(scope: Scope, **fields: Any) -> None:
    """Record fields for a request's log line: ids, and words that we define."""
    scope.setdefault(_ABOUT, {}).update(fields)


def request_id(scope: Scope) -> str:
    """Return the id of a request, which is in its log line and in its answer."""
    return str(scope.get(_ABOUT, {}).get("request", ""))


class Requests:
    """ASGI middleware before all routes, which gives every request and its answer an id."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry, routes: Iterable[Route]) -> None:
        self._app = app
        self._telemetry = telemetry
        self._templates: dict[Any, str] = {route.endpoint: route.path for route in routes}
        self._process = secrets.token_hex(4)
        self._count = count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = f"req_{self._process}{next(self._count):08x}"
        scope[_ABOUT] = {"request": name}
        exchange = _Exchange(scope, receive, send, name.encode())
        began = time.perf_counter()
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception:
            exchange.status = exchange.status or 500  # as it will be answered
            hide_token(scope)
            raise
        finally:
            self._log(scope, exchange, time.perf_counter() - began)

    def _log(self, scope: Scope, exchange: _Exchange, seconds: float) -> None:
        fields = scope[_ABOUT]
        fields["method"] = scope["method"][:_LONGEST_METHOD]
        fields["seconds"] = round(seconds, 4)
        fields["client"] = client_of(scope)
        fields["bytes"] = exchange.received or 0
        fields["sent"] = exchange.sent
        if "id" in (params := scope.get("path_params") or {}):
            fields.update(_id(params["id"]))
        if exchange.status and not exchange.complete:
            fields["ended"] = "early"
        route = self._templates.get(scope.get("endpoint", self._app), "unmatched")
        self._telemetry.request(route, exchange.status or _UNANSWERED, fields)


class _Exchange:
    """The messages of one request and its answer, counted."""

    __slots__ = (
        "_is_gone",
        "_name",
        "_receive",
        "_scope",
        "_send",
        "complete",
        "received",
        "sent",
        "status",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, name: bytes) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._name = name
        # Removed, as it would make the scope refer to itself.
        self._is_gone = (scope.get("extensions") or {}).pop(IS_GONE, lambda: False)
        self.status = 0
        self.received: int | None = None
        """Bytes of the body; None: it was not read."""
        self.sent = 0
        self.complete = False

    async def receive(self) -> Message:
        message = await self._receive()
        self.received = (self.received or 0) + len(message.get("body", b""))
        return message

    async def send(self, message: Message) -> None:
        """Send a message, and count it unless the client is gone."""
        begins = message["type"] == "http.response.start"
        if begins:
            hide_token(self._scope)
            # Copied, as some answers are made once for all requests.
            headers = [*message.get("headers", ()), (b"x-request-id", self._name)]
            if self.received is None and _expects(self._scope["headers"]):
                # The client may still send its body, or not (RFC 9110, 10.1.1).
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)
        if self._is_gone():
            return
        if begins:
            self.status = message["status"]
        else:
            self.sent += len(message.get("body", b""))
            self.complete = not message.get("more_body", False)


def _expects(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(name == b"expect" for name, _ in headers)


def _id(text: str) -> dict[str, str]:
    """Return the log field for the id in a path; empty if it is not an id."""
    found = _ID.fullmatch(text)
    return {_KINDS[found[1]]: found[0]} if found else {}
