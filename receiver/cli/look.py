"""Commands that show the data of a running receiver, and its live stream."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from receiver.cli.lists import connected, show_list, show_rows, whole_id
from receiver.cli.output import print_line, print_plainly, print_value
from receiver.cli.program import panel
from receiver.cli.replay import moment
from receiver.cli.words import (
    All,
    AsJson,
    Id,
    LikeMetadata,
    Limit,
    OfMetadata,
    OfModel,
    OfPrediction,
    OfProvider,
    Wide,
    metadata_filter,
    texts,
)

command = panel("Look")


@command(name="list")
def list_(
    status: Annotated[str | None, typer.Option(help="Only in this status.")] = None,
    provider: OfProvider = None,
    model: OfModel = None,
    metadata: LikeMetadata = None,
    since: Annotated[
        str | None, typer.Option(help="Only those created since: 24h, 7d, or RFC 3339.")
    ] = None,
    limit: Limit = 20,
    everything: All = False,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """List predictions, newest first."""
    params = {
        "status": status,
        "provider": provider,
        "model": model,
        "since": since and moment(since),
    }
    show_list(
        "predictions",
        params | metadata_filter(metadata),
        None if everything else limit,
        ("id", "provider", "model", "status", "created_at", "error"),
        ("channel", "metadata"),
        as_json=as_json,
        wide=wide,
    )


@command()
def show(prediction_id: Id, wide: Wide = False, as_json: AsJson = False) -> None:
    """Show one prediction and its deliveries, by its id or the id of its event or a delivery."""
    from receiver.cli.show import show

    with connected() as client:
        name = whole_id(client, prediction_id)
        prediction = client.fetch("predictions", name)
        deliveries = client.fetch("deliveries", prediction=name, limit=100)["data"]
        if as_json:
            print_plainly({**prediction, "deliveries": deliveries})
        else:
            show(prediction, deliveries, wide=wide)


@command()
def model(
    provider: Annotated[str, typer.Argument(help="The provider: oxen, eachlabs, fal or another.")],
    name: Annotated[str, typer.Argument(metavar="MODEL", help="The provider's own name for it.")],
    as_json: AsJson = False,
) -> None:
    """Show a provider's description of a model: its inputs and, at some providers, its price.

    The output is the provider's own JSON, with or without --json.
    """
    with connected() as client:
        found = client.fetch("models", provider, *name.split("/"))
        (print_plainly if as_json else print_value)(found)


@command()
def tail(
    kind: Annotated[
        str | None, typer.Option("--type", help="Only these types: succeeded,failed,queued, …")
    ] = None,
    provider: Annotated[str | None, typer.Option(help="Only of these providers.")] = None,
    metadata: OfMetadata = None,
    after: Annotated[
        int | None,
        typer.Option(help="Begin after this `seq` (it is in the JSON); 0: from the start.", min=0),
    ] = None,
    count: Annotated[int | None, typer.Option(help="Exit after this many lines.", min=1)] = None,
    deliveries: Annotated[
        bool,
        typer.Option(
            "--deliveries/--no-deliveries",
            help="Show attempts of handlers too; of these only new ones.",
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Show live changes of predictions, events, and attempts of handlers.

    After a lost connection it reconnects, and no change of a prediction is missed.
    """
    from itertools import islice

    from rich.console import Console

    from receiver.cli.tail import follow, show

    console = Console(highlight=False)
    try:
        with connected() as client:
            found = follow(
                client,
                after,
                type=kind,
                provider=provider,
                metadata=texts(metadata),
                deliveries=deliveries,
                on_loss=lambda text: print_line(f"-- {text}", err=True),
            )
            for message in islice(found, count):
                if as_json:
                    print_plainly(message)
                else:
                    show(console, message)
    except KeyboardInterrupt:
        raise typer.Exit from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the pipe is closed


@command()
def events(
    kind: Annotated[
        str | None, typer.Option("--type", help="Only these types: succeeded,failed,canceled.")
    ] = None,
    provider: OfProvider = None,
    metadata: OfMetadata = None,
    limit: Limit = 20,
    everything: All = False,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """List events (how predictions ended), newest first; `tail` follows them live."""
    show_list(
        "events",
        {"type": kind, "provider": provider} | metadata_filter(metadata),
        None if everything else limit,
        ("id", "provider", "model", "status", "channel", "time", "error"),
        ("metadata",),
        as_json=as_json,
        wide=wide,
        change=lambda row: {**row["prediction"], **row},
    )


@command()
def deliveries(
    state: Annotated[
        str | None, typer.Option(help="Only pending, running, done, skipped or dead.")
    ] = None,
    handler: Annotated[str | None, typer.Option(help="Only of this handler.")] = None,
    prediction: OfPrediction = None,
    limit: Limit = 20,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """List deliveries of events to handlers, newest first."""
    show_list(
        "deliveries",
        {"state": state, "handler": handler, "prediction": prediction},
        limit,
        ("prediction_id", "model", "handler", "state", "attempts", "due_at", "reason"),
        ("id", "created_at", "round"),
        as_json=as_json,
        wide=wide,
    )


@command()
def discarded(
    kind: Annotated[
        str | None, typer.Option(help="Only duplicate, late, unknown, rejected or unmatched.")
    ] = None,
    provider: OfProvider = None,
    prediction: OfPrediction = None,
    limit: Limit = 20,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """List outcomes and calls that reached no handler, latest first."""
    show_list(
        "discarded",
        {"kind": kind, "provider": provider, "prediction": prediction},
        limit,
        ("kind", "reason", "provider", "from", "prediction_id", "times", "last_at"),
        ("first_at",),
        as_json=as_json,
        wide=wide,
        change=lambda row: {**row, "from": row["channel"] or row["source"]},
    )


@command()
def handlers(wide: Wide = False, as_json: AsJson = False) -> None:
    """List handlers with their state and number of pending deliveries."""
    columns = ("name", "state", "pending", "registered", "paused_at", "open_until", "reason")
    with connected() as client:
        show_rows(client.fetch("handlers")["data"], columns, as_json=as_json, wide=wide)


@command()
def explain(
    name: Annotated[str, typer.Argument(metavar="EVENT_OR_PREDICTION")],
    kind: Annotated[
        str | None,
        typer.Option("--type", help="Assume that it ends so: succeeded, failed or canceled."),
    ] = None,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """Show which handlers run for an event, and why the others do not."""
    with connected() as client:
        found = client.fetch("predictions", whole_id(client, name), "explain", type=kind)
    if as_json:
        print_plainly(found)
        return
    rows = [
        {
            "handler": row["handler"],
            "runs": "yes" if row["runs"] else "no",
            "because": row["reason"]
            or row["held"]
            or (f"after {', '.join(row['after'])}" if row["after"] else ""),
            **{name: (row["delivery"] or {}).get(name) for name in ("state", "attempts", "reason")},
        }
        for row in found["handlers"]
    ]
    assumed = " (if it ends so)" if found["assumed"] else ""
    print_line(f"{found['prediction']}: {found['type']}{assumed}")
    show_rows(rows, ("handler", "runs", "because", "state", "attempts", "reason"), wide=wide)


@command()
def costs(
    by: Annotated[
        str,
        typer.Option(
            help="Group by, with commas: day, provider, model, recipe, key, metadata.NAME."
        ),
    ] = "day,provider",
    since: Annotated[str | None, typer.Option(help="The first day, as 2026-01-31.")] = None,
    until: Annotated[str | None, typer.Option(help="The day after the last.")] = None,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """Show costs in dollars, by default those of the last thirty days.

    `unknown` is the number of predictions whose cost is not known.
    """
    with connected() as client:
        found = client.fetch("costs", since=since, until=until, by=by)
    if as_json:
        print_plainly(found)
        return
    rows = [
        {**row["of"], **row, "amount": f"{row['amount']:.6f}"}
        for row in (*found["data"], found["total"])
    ]
    show_rows(rows, (*by.split(","), "amount", "predictions", "unknown"), wide=wide)
