"""Commands that submit, order and cancel predictions, and list recipes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Final, NoReturn

import typer

from receiver.cli.lists import change, connected, show_rows
from receiver.cli.output import print_line, print_value
from receiver.cli.program import panel
from receiver.cli.words import AsJson, Id, Wide, inputs, metadata
from receiver.model.errors import ReceiverError

command = panel("Predict")

_INPUT_HELP: Final = (
    "The input. A value may be JSON, as in num_images=2, but a name that ends in `prompt` or "
    "`text` always has plain text. NAME:=JSON is always JSON. NAME=@FILE sends a picture or "
    "another file of this machine, up to 3 MB, as a data URI; to begin a value with @, write @@."
)
_Wait = Annotated[bool, typer.Option("--wait", help="Wait for the outcome.")]
_Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="NAME=VALUE", help="Text kept with it; NAME:=JSON is JSON."),
]
_Key = Annotated[str | None, typer.Option("--key", help="Idempotency-Key.")]


@command()
def submit(
    provider: Annotated[
        str, typer.Argument(help="The provider's name, like fal; README lists them.")
    ],
    model: Annotated[str, typer.Argument(help="The provider's own name of the model.")],
    values: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME=VALUE…", help=_INPUT_HELP),
    ] = None,
    wait: _Wait = False,
    sync: Annotated[
        bool, typer.Option("--sync", help="Use the provider's blocking endpoint.")
    ] = False,
    of: _Metadata = None,
    key: _Key = None,
) -> None:
    """Submit a prediction; exits 1 if it failed or was canceled.

    With --wait, progress is printed on stderr; Ctrl-C leaves the prediction running.
    """
    headers = _keyed(key)
    body = {
        "provider": provider,
        "model": model,
        "input": inputs(values),
        "metadata": metadata(of),
        "mode": "sync" if sync else "queue",
    }
    if wait and sync:  # else the submit itself waits for the outcome
        headers["Prefer"] = "wait=1"

    with connected() as client:
        _submit(client, ("predictions",), body, headers, wait=wait)


@command(context_settings={"ignore_unknown_options": True})
def order(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Its name: `receiver recipes` lists them, `receiver recipes NAME` explains one."
        ),
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WORDS…",
            help="As typed in a chat: the text, and the recipe's options as --ratio 16:9 or "
            "ratio=16:9. A picture may be @FILE of this machine.",
        ),
    ] = None,
    person: Annotated[
        str | None,
        typer.Option("--person", help="Who orders: checked against allow lists and limits."),
    ] = None,
    place: Annotated[
        str | None, typer.Option("--place", help="The place; checked likewise.")
    ] = None,
    wait: _Wait = False,
    of: _Metadata = None,
    key: _Key = None,
) -> None:
    """Order by a recipe; exits 1 if the prediction failed or was canceled.

    With --wait, progress is printed on stderr; Ctrl-C leaves the prediction running.
    """
    headers = _keyed(key)
    from receiver.cli.ordering import options_of

    with connected() as client:
        body = {
            "options": options_of(client, recipe, words or ()),
            "metadata": metadata(of),
            "person": person,
            "place": place,
        }
        _submit(client, ("recipes", recipe), body, headers, wait=wait)


def _keyed(key: str | None) -> dict[str, str]:
    """Return the Idempotency-Key header, if a key is given; raise ReceiverError for a bad one."""
    if key is None:
        return {}
    if not key or not (key.isascii() and key.isprintable()):
        raise ReceiverError(
            "--key must be printable ASCII and not empty, as it travels in a header"
        )
    return {"Idempotency-Key": key}


def _submit(
    client: Any, path: tuple[str, ...], body: Any, headers: Mapping[str, str], *, wait: bool
) -> NoReturn:
    """Submit, print the prediction (with `wait` at its end), and exit: 1 if failed or canceled."""
    from receiver.cli import waiting
    from receiver.cli.show import addresses

    place = None
    if wait:
        with suppress(ReceiverError):  # without a place, earlier statuses are not printed
            place = client.place()
    prediction = client.send(*path, body=body, headers=headers)
    if wait:
        prediction = waiting.wait(client, prediction, place)
    print_value(prediction)
    for address in addresses(prediction) if wait else ():
        print_line(address, err=True)
    raise typer.Exit(int(prediction["status"] in {"failed", "canceled"}))


@command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Explain this recipe.")] = None,
    wide: Wide = False,
    as_json: AsJson = False,
) -> None:
    """List the recipes, or explain how to order by one."""
    from receiver.cli import ordering
    from receiver.predictions.commands import help_text

    with connected() as client:
        if name is not None:
            print_line(help_text(ordering.book_of(client), name), lines=True)
        elif as_json:
            show_rows(client.fetch("recipes")["data"], as_json=True)
        else:
            columns = ("name", "about", "options", "price")
            show_rows(ordering.listed(client), columns, ("provider", "model"), wide=wide)


@command()
def cancel(prediction_id: Id) -> None:
    """Cancel a prediction at its provider."""
    with connected() as client:
        print_value(change(client, prediction_id, "cancel"))
