"""A service on loopback that computes its answers from the requests."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.handlers.parts import Answer, Asked


@contextmanager
def service(answer: Callable[[Asked], Answer]) -> Iterator[str]:
    """Serve the answers of a function; an exception in it fails the test, not only the request."""
    errors: list[Exception] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.rfile.read(int(headers.get("content-length", 0)))
            try:
                status, more, content = answer(Asked(self.command, self.path, headers, body))
            except Exception as error:  # noqa: BLE001 - it is raised again below
                errors.append(error)
                status, more, content = 500, {}, b""
            self.send_response(status)
            for name, value in {"content-length": str(len(content)), **more}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = answer  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
    for error in errors:
        raise error
