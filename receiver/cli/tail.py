"""`receiver tail`: the live stream of a running receiver, one line per message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from receiver.cli.client import Client, ClientError
from receiver.cli.tables import STATES, age, shown


def follow(client: Client, after: int | None, **wanted: Any) -> Iterator[dict[str, Any]]:
    """Yield every message after a place, with its own place as `seq`; reconnect after a loss.

    `wanted` are arguments of `Receiver.changes`. Raises ClientError if the receiver refuses for
    good.
    """
    for message in client.changes(after, **wanted):
        yield {"seq": message.seq, "event": message.type, **_content(message.body)}


def _content(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ClientError("no-receiver", "what answers is not a receiver") from error


def show(console: Console, message: Mapping[str, Any]) -> None:
    """Print a message as one line, coloured if the terminal has colours."""
    console.print(_line(message), soft_wrap=True)


def _line(message: Mapping[str, Any]) -> Text:
    kind = message["event"].rpartition(".")[2]
    time = str(message.get("time", ""))[11:19] or "--:--:--"
    if kind == "gap":
        places = f"between {message['after']} and {message['until']}"
        text = f"the changes {places} are not stored any more"
        return Text("  ").join([shown(time, "dim"), shown(f"{kind:<11}", "red"), shown(text)])
    prediction = message["prediction"]
    parts = [
        shown(time, "dim"),
        shown(f"{kind:<11}", STATES.get(kind, "")),
        *(shown(prediction[name]) for name in ("id", "provider", "model")),
    ]
    if delivery := message.get("delivery"):
        return Text("  ").join([*parts, *_attempt(message, delivery)])
    if message.get("channel"):
        parts.append(shown(message["channel"], "dim"))
    outputs = prediction.get("output") or ()
    parts += [shown(str(one.get("url") or one.get("text"))[:120], "blue") for one in outputs]
    if error := prediction.get("error"):
        parts.append(shown(f"{error['code']}: {error['message']}", "red"))
    return Text("  ").join(parts)


def _attempt(message: Mapping[str, Any], delivery: Mapping[str, Any]) -> Iterator[Text]:
    """Yield handler and number of the attempt; if it failed, the reason and the next due time."""
    yield shown(f"{delivery.get('handler')} #{delivery.get('number')}", "bold")
    if delivery.get("reason"):
        style = STATES.get(str(delivery.get("state")), "yellow")
        yield shown(f"{delivery.get('result')}: {delivery['reason']}", style)
    if delivery.get("due_at"):
        yield shown(f"again {age(str(delivery['due_at']), _when(message.get('time')))}", "dim")


def _when(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text)).astimezone()
    except (ValueError, OverflowError):
        return None
