"""AWS Lambda on this machine: AWS's own runtime client with an emulated Runtime API.

A function has one environment, whose processes are suspended between invocations, and killed when
an invocation takes too long or a test says so; the next one gets a new environment. An HTTP server
in front converts requests to events, in each of AWS's formats.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Final
from urllib.parse import parse_qs, unquote

from tests.journey.parts import ROOT
from tests.patience import PATIENCE

Json = dict[str, Any]

CLIENT: Final = "203.0.113.7"
_RUNTIME: Final = "/2018-06-01/runtime"


class Failed(Exception):
    """The function reported that an invocation, or its init phase, failed."""


class Killed(Exception):
    """The invocation took too long, and its environment was killed."""


class Lambda:
    """One function with one environment at a time."""

    def __init__(self, handler: str, env: Mapping[str, str], log: Path, **options: Any) -> None:
        self._env = {**env, "_HANDLER": handler, "AWS_LAMBDA_FUNCTION_NAME": "receiver"}
        self._env |= {"AWS_LAMBDA_FUNCTION_VERSION": "1", "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "512"}
        self._env |= options.get("env", {})
        self._handler = handler
        self._log = log.open("ab")
        self._one = threading.Lock()
        self._numbers = itertools.count(1)
        self._events: Queue[tuple[str, bytes, float]] = Queue()
        self._ends: Queue[tuple[str, Any]] = Queue()
        self._idle = threading.Semaphore(0)
        self._process: subprocess.Popen[bytes] | None = None
        self.is_stuck: Callable[[], bool] = lambda: False
        """Whether the current invocation is to be killed before its time is over."""
        self.environments = 0
        self.killed = 0
        self.restored = 0
        self._api = ThreadingHTTPServer(("127.0.0.1", 0), self._speaks())
        self._api.daemon_threads = True
        threading.Thread(target=self._api.serve_forever, daemon=True).start()

    def invoke(self, event: object, seconds: float = 30.0) -> Any:
        """Return the function's answer to an event; raise Failed or Killed."""
        with self._one:
            if self._process is None:
                self._begin()
            self._signal(signal.SIGCONT)
            deadline = time.time() + seconds
            self._events.put((f"invocation-{next(self._numbers)}", _json(event), deadline))
            while (end := self._next_end()) is None:
                if time.time() > deadline or self.is_stuck():
                    self.killed += 1
                    self._end()
                    raise Killed
            kind, answer = end
            if kind != "response":
                raise Failed(answer)
            assert self._idle.acquire(timeout=PATIENCE)
            self._signal(signal.SIGSTOP)
            return answer

    def _next_end(self) -> tuple[str, Any] | None:
        """Return the end of the invocation; None if it is still running a moment later."""
        with suppress(Empty):
            return self._ends.get(timeout=0.05)
        return None

    def close(self) -> None:
        if self._process is not None:
            self._end()
        self._api.shutdown()
        self._api.server_close()
        self._log.close()

    def _begin(self) -> None:
        self.environments += 1
        env = {**os.environ, **self._env}
        env["AWS_LAMBDA_RUNTIME_API"] = f"127.0.0.1:{self._api.server_port}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "awslambdaric", self._handler],
            cwd=ROOT,
            env=env,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        assert self._idle.acquire(timeout=PATIENCE)
        if not self._ends.empty():
            self._end()
            raise Failed(self._ends.get())

    def _end(self) -> None:
        assert self._process is not None
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process = None
        self._idle = threading.Semaphore(0)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _speaks(self) -> type[BaseHTTPRequestHandler]:
        function = self

        class Api(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path == f"{_RUNTIME}/restore/next":
                    function.restored += 1
                    self._say(200)
                    return
                assert self.path == f"{_RUNTIME}/invocation/next"
                function._idle.release()
                name, event, deadline = function._events.get()
                headers = {
                    "Content-Type": "application/json",
                    "Lambda-Runtime-Aws-Request-Id": name,
                    "Lambda-Runtime-Deadline-Ms": str(int(deadline * 1000)),
                    "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:eu:1:function:receiver",
                }
                self._say(200, event, headers)

            def do_POST(self) -> None:
                size = int(self.headers.get("content-length") or 0)
                said = json.loads(self.rfile.read(size) if size else self._chunks())
                self._say(202, b"{}")
                function._ends.put((self.path.rpartition("/")[2], said))
                if self.path == f"{_RUNTIME}/init/error":
                    function._idle.release()

            def _chunks(self) -> bytes:
                found = b""
                while size := int(self.rfile.readline(), 16):
                    found += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return found

            def _say(
                self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
            ) -> None:
                self.send_response(status)
                for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        return Api


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


# --- requests as events ---


class Request:
    """An HTTP request to be converted to an event."""

    def __init__(
        self,
        method: str,
        target: str,
        headers: list[tuple[str, str]],
        body: bytes = b"",
        *,
        binary: bool = False,
    ) -> None:
        self.method = method
        self.path, _, self.query = target.partition("?")
        self.headers = headers
        text = base64.b64encode(body).decode() if binary else body.decode()
        self.content = {"body": text or None, "isBase64Encoded": binary}

    @property
    def by_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, value in self.headers:
            found.setdefault(name, []).append(value)
        return found

    @property
    def joined(self) -> dict[str, str]:
        return {name.lower(): ",".join(values) for name, values in self.by_name.items()}

    @property
    def values(self) -> dict[str, list[str]]:
        return parse_qs(self.query, keep_blank_values=True)


def second(request: Request) -> Json:
    """Return payload 2.0, of function URLs and HTTP APIs."""
    headers = request.joined
    cookies = [one.strip() for one in headers.pop("cookie", "").split(";") if one]
    http = {"method": request.method, "path": request.path, "protocol": "HTTP/1.1"}
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": request.path,
        "rawQueryString": request.query,
        **({"cookies": cookies} if cookies else {}),
        "headers": {**headers, "x-forwarded-for": CLIENT, "x-forwarded-proto": "https"},
        "requestContext": {
            "domainName": "abc.lambda-url.eu-central-1.on.aws",
            "http": {**http, "sourceIp": CLIENT, "userAgent": "tests"},
            "stage": "$default",
        },
        **request.content,
    }


def staged(request: Request) -> Json:
    """Return payload 2.0 of an HTTP API with a stage."""
    event = second(request)
    event["rawPath"] = f"/prod{request.path}"
    event["requestContext"]["stage"] = "prod"
    return event


def first(request: Request) -> Json:
    """Return payload 1.0, of REST APIs, which decode paths and queries."""
    values = request.values
    return {
        "resource": "/{proxy+}",
        "path": unquote(request.path),
        "httpMethod": request.method,
        "headers": {name: found[-1] for name, found in request.by_name.items()},
        "multiValueHeaders": request.by_name,
        "queryStringParameters": {name: found[-1] for name, found in values.items()} or None,
        "multiValueQueryStringParameters": values or None,
        "requestContext": {
            "stage": "prod",
            "path": f"/prod{request.path}",
            "httpMethod": request.method,
            "identity": {"sourceIp": CLIENT, "userAgent": "tests"},
        },
        **request.content,
    }


def _of_balancer(request: Request, *, many: bool) -> Json:
    raw = [pair.partition("=")[::2] for pair in request.query.split("&") if pair]
    forwarded = {"x-forwarded-for": f"6.6.6.6, {CLIENT}", "x-forwarded-proto": "https"}
    event: Json = {
        "requestContext": {"elb": {"targetGroupArn": "arn:aws:elasticloadbalancing:eu:1:x"}},
        "httpMethod": request.method,
        "path": request.path,
        **request.content,
        "body": request.content["body"] or "",
    }
    if many:
        event["multiValueHeaders"] = {
            **{name.lower(): values for name, values in request.by_name.items()},
            **{name: [value] for name, value in forwarded.items()},
        }
        event["multiValueQueryStringParameters"] = {
            name: [value for other, value in raw if other == name] for name, _ in raw
        }
    else:
        event["headers"] = request.joined | forwarded
        event["queryStringParameters"] = dict(raw)
    return event


def balanced(request: Request) -> Json:
    """Return the event of a load balancer."""
    return _of_balancer(request, many=False)


def balanced_many(request: Request) -> Json:
    """Return the event of a load balancer whose target group has multi-value headers on."""
    return _of_balancer(request, many=True)


SHAPES: Final[dict[str, Callable[[Request], Json]]] = {
    shape.__name__: shape for shape in (second, staged, first, balanced, balanced_many)
}


def headers_of(answer: Json) -> list[tuple[str, str]]:
    """Return the headers of an answer in any of the formats."""
    found = [(name, value) for name, value in answer.get("headers", {}).items()]
    for name, values in answer.get("multiValueHeaders", {}).items():
        found += [(name, value) for value in values]
    return found + [("set-cookie", value) for value in answer.get("cookies", [])]


def body_of(answer: Json) -> bytes:
    body = answer["body"]
    return base64.b64decode(body) if answer["isBase64Encoded"] else body.encode()


@contextmanager
def in_front_of(function: Lambda, port: int) -> Iterator[str]:
    """Serve HTTP on a port by events, in each format in turn; yield the base URL."""
    shapes = itertools.cycle(SHAPES.values())

    class Front(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            body, given = self.rfile.read(size), [*self.headers.items()]
            event = next(shapes)(Request(self.command, self.path, given, body, binary=bool(size)))
            try:
                answer = function.invoke(event)
            except (Failed, Killed):
                answer = {"statusCode": 502, "body": "", "isBase64Encoded": False}
            content = body_of(answer)
            self.send_response(answer["statusCode"])
            for name, value in headers_of(answer):
                if name != "content-length":
                    self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815 - as the library calls it

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", port), Front)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.shutdown()
        server.server_close()
