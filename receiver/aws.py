"""The AWS Lambda function: `receiver.aws.handler` answers requests; any other event is a drain.

Requests come from a function URL or an HTTP API (payload 2.0), a REST API (1.0) or a load balancer.
A schedule's event, messages of SQS or SNS, or `{"receiver": "drain"}` run due work within the
remaining time of the invocation. The app is created when this module is imported, in the init
phase, and started by the first invocation, so that a snapshot contains no connections and no
identity. The app and its event loop live as long as the environment, which is frozen between
invocations.
"""

from __future__ import annotations

import asyncio
import base64
import os
import random
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final
from urllib.parse import quote, unquote, urlencode

import msgspec
import structlog
from starlette.types import Message, Scope

from receiver.asgi import create_app
from receiver.http.problems import problem_response
from receiver.http.selfstarting import CUT_OFF, SelfStarting
from receiver.model.errors import Problem
from receiver.observability import logging as logs
from receiver.settings import Settings

log = structlog.get_logger("receiver")

Event = Mapping[str, Any]
Answer = dict[str, Any]

_MARGIN: Final = 0.5
"""Seconds before the end of an invocation at which a request is cut off and answered."""
_SETTLING: Final = 5.0
"""Seconds that a drain has to finish after its time; at most a quarter of the invocation."""
_LEAST: Final = 0.1
_OVER: Final = "the function's time was over before there was an answer; give it a longer timeout"


class Function:
    """The state that one environment of the function keeps between its invocations."""

    def __init__(self, app: SelfStarting) -> None:
        self._app = app

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """The event loop, created at first use: environments are copied, by fork and snapshot."""
        return asyncio.new_event_loop()

    def __call__(self, event: Any, context: Any) -> Answer:
        """Answer an event; unfinished tasks of the loop continue in the next invocation."""
        left = context.get_remaining_time_in_millis() / 1000
        answer = self._answer(event, left) if is_request(event) else self._drain(left)
        try:
            return self._loop.run_until_complete(answer)
        finally:
            logs.flush()  # a thread writes the lines, and threads are frozen after the answer

    def close(self) -> None:
        """Stop the app and its loop before a snapshot is taken."""
        if loop := self.__dict__.pop("_loop", None):
            loop.run_until_complete(self._app.stop())
            loop.close()
        logs.flush()

    async def _drain(self, left: float) -> Answer:
        done = await self._app.drain(max(left - min(_SETTLING, left / 4), _LEAST))
        return dict(msgspec.to_builtins(done))

    async def _answer(self, event: Event, left: float) -> Answer:
        scope, exchange = scope_of(event), _Exchange(body_of(event))
        limit = asyncio.timeout(max(left - _MARGIN, _LEAST))
        CUT_OFF.set(asyncio.get_running_loop().time() + left)
        try:
            async with limit:
                await self._app(scope, exchange.receive, exchange.send)
        except Exception:
            if not (limit.expired() or exchange.status):
                raise
            # The app has logged and answered a fault; a stream ends with what was sent so far.
        return exchange.answer(event, has_body=scope["method"] != "HEAD")


class _Exchange:
    """The messages of one request and its answer."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._is_over = asyncio.Event()
        self._sent = bytearray()
        self._headers: list[tuple[bytes, bytes]] = []
        self.status = 0

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._is_over.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self._headers = message["status"], list(message["headers"])
        elif message["type"] == "http.response.body":
            self._sent += message.get("body", b"")
            if not message.get("more_body", False):
                self._is_over.set()

    def answer(self, event: Event, *, has_body: bool) -> Answer:
        """Return the answer in the format that matches the event's."""
        if not self.status:
            self.status = 503
            answer = problem_response(Problem(503, "unavailable", _OVER, retry_after=5))
            self._headers, self._sent[:] = answer.raw_headers, answer.body
        if not has_body:
            self._sent.clear()  # as servers do
        headers: dict[str, list[str]] = {}
        for name, value in self._headers:
            headers.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
        found: Answer = {"statusCode": self.status, **_encoded(bytes(self._sent))}
        if _is_payload_2(event):
            cookies = headers.pop("set-cookie", [])
            return found | {"cookies": cookies, "headers": _joined(headers)}
        if _is_of_balancer(event):
            found["statusDescription"] = f"{self.status} {'OK' if self.status < 400 else 'Error'}"  # noqa: PLR2004
            if "multiValueHeaders" not in event:
                return found | {"headers": _joined(headers)}
        return found | {"multiValueHeaders": headers}


def _encoded(content: bytes) -> Answer:
    """Return a body as text, or in base64 if it is not UTF-8."""
    # As text, UTF-8 keeps its bytes; pictures and gzip are not UTF-8, by their first two bytes.
    try:
        return {"body": content.decode(), "isBase64Encoded": False}
    except UnicodeDecodeError:
        return {"body": base64.b64encode(content).decode(), "isBase64Encoded": True}


def _joined(headers: Mapping[str, list[str]]) -> dict[str, str]:
    return {name: ", ".join(values) for name, values in headers.items()}


# --- the contents of an event ---


def is_request(event: Any) -> bool:
    """Return whether an event is an HTTP request, in one of the three formats."""
    return isinstance(event, Mapping) and (
        _is_payload_2(event) or (isinstance(event.get("httpMethod"), str) and "path" in event)
    )


def _context(event: Event) -> Event:
    found = event.get("requestContext")
    return found if isinstance(found, Mapping) else {}


def _is_payload_2(event: Event) -> bool:
    """Return whether an event has payload format 2.0."""
    return "http" in _context(event)


def _is_of_balancer(event: Event) -> bool:
    return "elb" in _context(event)


def body_of(event: Event) -> bytes:
    body = event.get("body") or ""
    return base64.b64decode(body) if event.get("isBase64Encoded") else body.encode()


def scope_of(event: Event) -> Scope:
    """Return the ASGI scope of a request."""
    context = _context(event)
    http = context.get("http", {})
    path = unquote(event["rawPath"] if http else event["path"]) or "/"
    stage = f"/{context.get('stage')}"
    # An HTTP API leaves the name of its stage in the path, except for the default stage.
    root = stage if http and f"{path}/".startswith(f"{stage}/") else ""
    if path == root:
        path += "/"
    headers = _headers(event)
    address = (http or context.get("identity") or {}).get("sourceIp")
    protocols = [value for name, value in headers if name == b"x-forwarded-proto"]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": http.get("method") or event["httpMethod"],
        "scheme": protocols[-1].decode("latin-1") if protocols else "https",
        "path": path,
        "raw_path": quote(path, safe="/%:@!$&'()*+,;=~").encode(),
        "query_string": _query(event).encode(),
        "root_path": root,
        "headers": headers,
        # A load balancer gives it in X-Forwarded-For only, whose end is trusted in that case.
        "client": (address, 0) if address else None,
        "server": None,
    }


def _headers(event: Event) -> list[tuple[bytes, bytes]]:
    many = event.get("multiValueHeaders") or {
        name: [value] for name, value in (event.get("headers") or {}).items()
    }
    if cookies := event.get("cookies"):
        many = {**many, "cookie": ["; ".join(cookies)]}
    return [
        (name.lower().encode(), str(value).encode()) for name in many for value in many[name] or ()
    ]


def _query(event: Event) -> str:
    """Return the query as it came; a REST API has decoded it, so it is encoded again."""
    if "rawQueryString" in event:
        return str(event["rawQueryString"])
    many = event.get("multiValueQueryStringParameters") or {
        name: [value] for name, value in (event.get("queryStringParameters") or {}).items()
    }
    if _is_of_balancer(event):
        return "&".join(f"{name}={value}" for name, values in many.items() for value in values)
    return urlencode(many, doseq=True)


handler: Final = Function(
    SelfStarting(create_app(Settings.read({"RECEIVER_MODE": "serverless", **os.environ})))
)
"""The entry point, which AWS calls with each event."""

try:
    from snapshot_restore_py import (  # type: ignore[import-untyped]
        register_after_restore,
        register_before_snapshot,
    )
except ModuleNotFoundError:  # AWS's own package, installed only where snapshots are taken
    pass
else:
    register_before_snapshot(handler.close)
    register_after_restore(random.seed)  # else copies of a snapshot would have equal backoffs
