"""Follow what happens at a running receiver, through reconnects, line by line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import httpx
import msgspec
from httpx_sse import EventSource, SSEError
from rich.console import Console
from rich.text import Text

from receiver.cli.output import shown
from receiver.client import Client, ClientError

_COLOURS: Final = {
    "succeeded": "green",
    "failed": "red",
    "canceled": "yellow",
    "unconfirmed": "magenta",
    "processing": "cyan",
}
_FIRST_WAIT: Final = 0.5
_LONGEST_WAIT: Final = 10.0
_PATIENCE: Final = 45.0
"""Seconds without a byte after which a stream is dead: keep-alives come every 15."""


def follow(
    client: Client,
    params: Mapping[str, str],
    after: str | None,
    notice: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[dict[str, Any]]:
    """Return every message from a place on, with its place as `seq`; make lost connections again.

    Raises ClientError where the receiver refuses for good. `notice` hears of losses.
    """
    wait = _FIRST_WAIT
    while True:
        headers = {} if after is None else {"Last-Event-ID": after}
        try:
            with client.stream("/v1/events/stream", params, headers, _PATIENCE) as response:
                after = after or response.headers.get("last-event-id")
                for event in EventSource(response).iter_sse():
                    wait = _FIRST_WAIT
                    if not event.data:
                        continue
                    after = event.id
                    if event.event == "stream.open":
                        continue
                    yield {"seq": int(event.id), "event": event.event, **_content(event.data)}
            reason = "the receiver ended the stream"
        except (httpx.HTTPError, SSEError) as error:
            reason = f"{type(error).__name__}: {error}"
        notice(f"{reason}; again in {wait:g} s")
        sleep(wait)
        wait = min(wait * 2, _LONGEST_WAIT)


def _content(data: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ClientError("what answers is no receiver") from error


def show(console: Console, message: Mapping[str, Any]) -> None:
    """Print a message as one line, coloured where there are colours."""
    console.print(_line(message), soft_wrap=True)


def _line(message: Mapping[str, Any]) -> Text:
    kind = message["event"].rpartition(".")[2]
    time = str(message.get("time", ""))[11:19] or "--:--:--"
    if kind == "gap":
        said = f"what happened between {message['after']} and {message['until']} is not there"
        return Text("  ").join([shown(time, "dim"), shown(f"{kind:<11}", "red"), shown(said)])
    prediction = message["prediction"]
    parts = [
        shown(time, "dim"),
        shown(f"{kind:<11}", _COLOURS.get(kind, "")),
        *(shown(prediction[name]) for name in ("id", "provider", "model")),
    ]
    if message.get("channel"):
        parts.append(shown(message["channel"], "dim"))
    outputs = prediction.get("output") or ()
    parts += [shown(str(one.get("url") or one.get("text"))[:120], "blue") for one in outputs]
    if error := prediction.get("error"):
        parts.append(shown(f"{error['code']}: {error['message']}", "red"))
    return Text("  ").join(parts)
