"""Serve the emulator with the options of the journey: `python emulating.py PORT`."""

import json
import os
import sys

import msgspec
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from receiver.emulator import Options, create_emulator

OPTIONS = {
    "generation": 0.5,
    "shape": "mixed",
    "keep_alive": 1,
    "stray_events": 0.3,
    "time_scale": 0.05,
    "eachlabs_in_flight": None,
    "eachlabs_per_minute": None,
    "seed": 11,
}


class Counting:
    """Counts the connections to Oxen's stream: `GET /_journey/streams`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path")
        if path == "/_journey/streams":
            await PlainTextResponse(str(self._streams))(scope, receive, send)
            return
        listens = path == "/oxen/api/events"
        self._streams += listens
        try:
            await self._app(scope, receive, send)
        finally:
            self._streams -= listens


if __name__ == "__main__":
    given = OPTIONS | json.loads(os.environ.get("JOURNEY_OPTIONS", "{}"))
    app = Counting(create_emulator(msgspec.convert(given, Options)))
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning", ws="none")
