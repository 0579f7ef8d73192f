"""Commands that change data or handlers of a running receiver: redeliver, pause, erase."""

from __future__ import annotations

from typing import Annotated

import typer

from receiver.cli.lists import change, connected, delivery_to_retry, show_list, whole_id
from receiver.cli.output import print_line, print_value
from receiver.cli.program import panel
from receiver.cli.replay import is_interactive, moment, replay_all
from receiver.cli.words import (
    AsJson,
    Id,
    LikeMetadata,
    Limit,
    OfModel,
    OfProvider,
    Wide,
    Yes,
    texts,
)
from receiver.model.errors import ReceiverError

command = panel("Change")

_HandlerName = Annotated[str, typer.Argument(metavar="HANDLER")]


@command()
def retry(
    delivery_id: Id,
    handler: Annotated[
        str | None, typer.Option(help="The handler, if ID is that of a prediction.")
    ] = None,
) -> None:
    """Retry a dead or skipped delivery, or a pending one at once."""
    with connected() as client:
        name = delivery_to_retry(client, delivery_id, handler)
        print_value(client.send("deliveries", name, "retry"))


@command()
def replay(
    prediction_id: Annotated[
        str | None,
        typer.Argument(metavar="ID", help="One prediction; without it, choose by the options."),
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Only events since then: 24h, 7d, or RFC 3339.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Only events before then.")] = None,
    provider: OfProvider = None,
    model: OfModel = None,
    handler: Annotated[str | None, typer.Option(help="Only to this handler.")] = None,
    state: Annotated[
        str | None, typer.Option(help="Only deliveries that are done, skipped or dead.")
    ] = None,
    metadata: LikeMetadata = None,
    yes: Yes = False,
) -> None:
    """Redeliver events to their handlers: one prediction's, or all that match."""
    given = {
        "since": since and moment(since),
        "until": until and moment(until),
        "provider": provider,
        "model": model,
        "handler": handler,
        "state": state,
        "metadata": texts(metadata),
    }
    wanted = {name: value for name, value in given.items() if value}
    with connected() as client:
        if prediction_id is None:
            replay_all(client, wanted, yes=yes)
        elif wanted:
            raise ReceiverError("give an ID or the options, not both")
        else:
            print_value(change(client, prediction_id, "replay"))


@command()
def replays(
    cancel: Annotated[str | None, typer.Option(metavar="ID", help="Stop this one.")] = None,
    limit: Limit = 20,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """List bulk replays, newest first, or cancel one."""
    columns = ("id", "state", "events", "matched", "replayed", "wanted", "created_at", "ended_at")
    if cancel is None:
        show_list("replays", {}, limit, columns, as_json=as_json, wide=wide)
        return
    with connected() as client:
        print_value(client.send("replays", whole_id(client, cancel, "rep"), "cancel"))


@command()
def pause(name: _HandlerName) -> None:
    """Pause a handler: no new attempt starts; its deliveries stay pending until `resume`."""
    with connected() as client:
        print_value(client.send("handlers", name, "pause"))


@command()
def resume(name: _HandlerName) -> None:
    """Run a handler's deliveries again, after `pause` or after failures."""
    with connected() as client:
        print_value(client.send("handlers", name, "resume"))


@command()
def erase(prediction_id: Id, yes: Yes = False) -> None:
    """Erase the input, metadata and outputs of a prediction; its id, status and times stay.

    On a terminal it asks first.
    """
    with connected() as client:
        name = whole_id(client, prediction_id)
        if not yes and is_interactive():
            prediction = client.fetch("predictions", name)
            about = " ".join(str(prediction[word]) for word in ("id", "model", "status"))
            print_line(f"{about}: input, metadata and outputs will be gone for ever.", err=True)
            typer.confirm("Erase it?", abort=True)
        print_value(client.send("predictions", name, "erase"))
