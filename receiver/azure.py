"""The Azure Functions app: `from receiver.azure import app` is a complete `function_app.py`.

One function answers every request, another drains once a minute. RECEIVER_PUBLIC_URL must end in
the prefix `/api`, unless `routePrefix` in `host.json` is empty.
"""

from __future__ import annotations

import os
from typing import Final

import azure.functions as func
from starlette.types import Receive, Scope, Send

from receiver.asgi import create_app
from receiver.http.selfstarting import SelfStarting
from receiver.settings import Settings

__all__ = ["app"]

_DRAIN: Final = 50.0
"""Seconds that a drain may take: one starts each minute."""


class Adapted(SelfStarting):
    """The app, with the scope fields added that Azure's library leaves out."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("asgi", {"version": "3.0", "spec_version": "2.1"})
        if scope["type"] == "http":
            headers = scope["headers"] = [(name.lower(), value) for name, value in scope["headers"]]
            sent = dict(headers)
            # Front Door names the caller in this header. With X-Forwarded-For it is ignored, as
            # any client could have sent it.
            if b"x-forwarded-for" not in sent and (address := sent.get(b"x-azure-clientip")):
                scope["client"] = (address.decode("latin-1"), 0)
        await super().__call__(scope, receive, send)


_STARTING: Final = Adapted(create_app(Settings.read({"RECEIVER_MODE": "serverless", **os.environ})))

# Azure's function keys are off: callbacks have none, and `/v1` has its own keys.
app = func.AsgiFunctionApp(_STARTING, http_auth_level=func.AuthLevel.ANONYMOUS)


@app.timer_trigger(schedule="0 * * * * *", arg_name="timer")
async def drain(timer: func.TimerRequest) -> None:  # noqa: ARG001 - the trigger needs it
    """Run due work, once a minute."""
    await _STARTING.drain(_DRAIN)
