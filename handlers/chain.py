"""Submit the next prediction from a result. Use: `CHAIN_PROVIDER=fal … receiver serve chain`.

The texts in CHAIN_INPUT are Templates, at any depth:
{"prompt": "make it night", "image_urls": ["{urls}"], "strength": 0.4}. "{urls}" alone in a list
becomes an item for each result. RECEIVER_MAX_CHAIN limits CHAIN_DEPTH.

The next prediction has the parent's id as its `parent_id` and is never submitted twice for one
event. It gets results by address, which stays valid if `save` runs; results that `save` flagged are
not passed on.
"""

from typing import Any

import msgspec

from receiver import Context, Dead, Event, Output, Skip, Template, on, read_settings

EACH = "{urls}"


def decode(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError:
        raise ValueError('must be a JSON object, like {"image_url": "{url}"}') from None


def parse(value: Any) -> Any:
    """Replace every text by a Template, except `EACH` in a list."""
    if isinstance(value, dict):
        return {key: parse(item) for key, item in value.items()}
    if isinstance(value, list):
        return [item if item == EACH else parse(item) for item in value]
    return Template(value) if isinstance(value, str) else value


with read_settings() as read:
    PROVIDER = read.matching(
        "CHAIN_PROVIDER", "the name of a provider, as fal", r"[\w-]+", default=""
    )
    MODEL = read.matching("CHAIN_MODEL", "its model, as it calls it", r"[^\s\"']+", default="")
    if "" in (PROVIDER, MODEL):
        read.refuse("chain needs CHAIN_PROVIDER and CHAIN_MODEL: what to submit next")
    INPUT = read.parsed(
        "CHAIN_INPUT",
        'a JSON object, like {"image_url": "{url}"}',
        lambda text: parse(decode(text)),
    )
    FROM = read.matching(
        "CHAIN_FROM",
        "the models, with shell wildcards, whose results are taken",
        r"[^\s\"']+",
        default="*",
    )
    DEPTH = read.whole(
        "CHAIN_DEPTH",
        "how many predictions may follow one in a row. 1: the next one starts no other",
        default="1",
    )
    METADATA = read.parsed(
        "CHAIN_METADATA",
        "a JSON object that is added to the parent's metadata, which the next one inherits",
        decode,
        default="{}",
    )


@on("succeeded", model=FROM, name="chain", timeout=120, after="save")
async def chain(event: Event, ctx: Context) -> None:
    parent = event.prediction
    if parent.depth >= DEPTH:
        raise Skip(f"this one is {parent.depth} deep, and CHAIN_DEPTH is {DEPTH}")
    good = usable(parent.output or [])
    passed = msgspec.structs.replace(event, prediction=msgspec.structs.replace(parent, output=good))
    await ctx.submit(PROVIDER, MODEL, fill(INPUT, passed), metadata={**parent.metadata, **METADATA})


def usable(outputs: list[Output]) -> list[Output]:
    """Return the results that a provider can fetch; raise Skip or Dead if there is none."""
    files = [output for output in outputs if output.url]
    if not files:
        raise Skip("no result has an address")
    unflagged = [output for output in files if not (output.stored and output.stored.flagged)]
    if not unflagged:
        raise Skip(f"every result is flagged: {files[0].stored and files[0].stored.flagged}")
    good = [output for output in unflagged if output.address]
    if not good:
        raise Dead(
            "no result has an address that a provider can open: they came inside a data: URI; "
            "serve `save` with SAVE_PUBLIC_URL too"
        )
    return good


def fill(value: Any, event: Event) -> Any:
    if isinstance(value, Template):
        return value.fill(event)
    if isinstance(value, dict):
        return {key: fill(item, event) for key, item in value.items()}
    if isinstance(value, list):
        return [filled for item in value for filled in each(item, event)]
    return value


def each(item: Any, event: Event) -> list[Any]:
    return Template(EACH).fill(event).split("\n") if item == EACH else [fill(item, event)]
