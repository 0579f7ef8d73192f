"""Order by a signed request at `/in/trigger/{name}`: from GitHub, n8n, cron, a shop, or a script.

Use: `TRIGGERS=triggers.toml RECEIVER_RECIPES=recipes.toml receiver serve trigger-in`. The file
TRIGGERS has a table for each trigger:

    [drawn]
    proof = "github"                  # or standard, hmac, bearer
    secret = "DRAWN_SECRET"           # the environment variable that holds it
    when = { action = "labeled", "label.name" = "draw*", "header:x-github-event" = "issues" }
    recipe = "imagine"
    options = { prompt = "{issue.title}, as a poster" }
    person = "github:{sender.login}"

A repeated call orders only once: `key` is the part that repeats have in common, if the proof does
not define it. Person and place are `trigger:drawn` unless the file sets them, and the recipes'
`[[allow]]` must name them. CloudEvents 1.0 are unwrapped: a path in a template leads into
the event's JSON data, and the event's attributes are `header:ce-id` and so on.
"""

import base64
from typing import Any
from urllib.parse import unquote

import msgspec

from receiver import Call, Door, Problem, Reply, Unproved, read_settings, route

from ._templates import Message, filled, unfit, word
from ._triggers import read_triggers

LONGEST = 1_000_000  # bytes of a body
LONGEST_KEY = 2000
TIMEOUT = 9  # seconds: GitHub waits for ten, and does not repeat
IGNORED = Reply.json({"status": "ignored"})
REQUIRED = ("id", "source", "type")

with read_settings() as read:
    TRIGGERS = read_triggers(read)


def prove(call: Call) -> None:
    trigger = TRIGGERS.get(call.rest)
    if trigger is None:
        raise Unproved("unknown_trigger")
    trigger.proof.check(call)


@route("trigger", proof=prove, rest=True, longest=LONGEST, timeout=TIMEOUT)
async def order(call: Call, door: Door) -> Reply:
    if call.header("x-github-event") == "ping":
        return IGNORED
    trigger, message = TRIGGERS[call.rest], opened(call)
    if not all(condition.holds(message) for condition in trigger.when):
        door.log.info("trigger.ignored", trigger=call.rest)
        return IGNORED
    prediction = await door.order(
        trigger.recipe,
        filled(trigger.options, message),
        key=f"{call.rest}/{trigger.key.name('key', message, LONGEST_KEY)}",
        person=trigger.person.name("person", message),
        place=trigger.place.name("place", message),
        metadata=filled(trigger.metadata, message),
    )
    return Reply.json({"id": prediction.id, "status": prediction.status}, 202)


def opened(call: Call) -> Message:
    """Read a proved call; raise Problem for malformed content."""
    kind = call.header("content-type").partition(";")[0].strip().lower()
    return OPENED.get(kind, as_json)(call)


def as_json(call: Call) -> Message:
    # CloudEvents percent-encodes non-ASCII characters in its headers.
    headers = {n: unquote(v) if n.startswith("ce-") else v for n, v in call.headers.items()}
    return Message(headers, call.json() if call.body else {})


def as_form(call: Call) -> Message:
    if call.body.lstrip()[:1] in {b"{", b"["}:  # curl sends all data with a form's content type
        return as_json(call)
    form = call.form()
    if "x-github-event" in call.headers and "payload" in form:  # GitHub's default
        return Message(call.headers, decoded(form["payload"]))
    return Message(call.headers, form)


def as_event(call: Call) -> Message:
    """Unwrap a CloudEvent that is entirely in the body; its attributes become `ce-` headers."""
    event = call.json(dict[str, Any])
    missing = [n for n in REQUIRED if not isinstance(event.get(n), str) or not event[n]]
    if missing or event.get("specversion") != "1.0":
        raise unfit(f"the body is not a CloudEvent 1.0: {', '.join(missing) or 'specversion'}")
    data = event.pop("data", {})
    if "data_base64" in event:
        data = decoded(unwrapped(event.pop("data_base64")))
    sent = {name: value for name, value in call.headers.items() if not name.startswith("ce-")}
    return Message(sent | {f"ce-{name.lower()}": word(v) for name, v in event.items()}, data)


def unwrapped(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        raise unfit("data_base64 is not base64") from None


def decoded(content: str | bytes) -> Any:
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise Problem(400, "invalid-json", "what is in the body is not JSON") from None


def as_batch(_: Call) -> Message:
    raise unfit("a batch of CloudEvents is several orders: send each by itself")


OPENED = {
    "application/x-www-form-urlencoded": as_form,
    "application/cloudevents+json": as_event,
    "application/cloudevents-batch+json": as_batch,
}
