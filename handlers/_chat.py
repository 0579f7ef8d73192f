"""Shared by slack-in, discord-in and telegram-in: reading orders, signing buttons, failures."""

import asyncio
import base64
import os
import re
import tempfile
from collections import deque
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from receiver import Dead, Door, Event, Fetched, Prediction, Problem, Retry, Skip, Unproved

FAILURES = {
    "content_policy": "The model's rules do not allow that. Try other words.",
    "timeout": "The model took too long and gave up. Try it again.",
    "expired": "No result came in time.",
    "unconfirmed": "No result came, and it is not known whether the model began with this.",
    "rejected": "The model refused this: {message}",
    "provider_error": "The model failed. Try it again.",
    "canceled": "Canceled.",
}
"""Texts for people, by the code of an error."""
AGAIN, CANCEL, DELETE, NAMED = "a", "c", "d", "b"
"""Actions of buttons; NAMED is one of the recipe's buttons, followed by its label's digest."""
MOST_PICTURE = 5_000_000  # bytes: it is sent within the order
PICTURES = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpeg",
    b"GIF8": "gif",
    b"RIFF": "webp",
}


class Who(msgspec.Struct, frozen=True):
    """The person who orders or presses, and the place."""

    person: str
    place: str
    is_admin: bool = False
    is_direct: bool = False
    """Whether the place is a direct message with the bot."""


class Press(msgspec.Struct, frozen=True):
    """The action of a signed button, and its prediction."""

    action: str
    prediction_id: str


# --- orders ---


def read(door: Door, text: str, name: str = "") -> Any:
    """Read a typed text, after the command `name` if there was one; raise Problem.

    A text that names no recipe goes to the recipe that takes free words, if there is just one.
    """
    recipes = {recipe.name: recipe for recipe in door.recipes()}
    if text.strip().lower() == "help":
        return door.command(f"help {name}" if name in recipes else "help")
    if name in recipes:
        return door.command(f"{name} {text}")
    first = (text.split() or ["help"])[0].lower().removeprefix("/")
    takers = [one.name for one in recipes.values() if takes_words(one)]
    is_named = first in recipes or first == "help"
    return door.command(text if is_named or len(takers) != 1 else f"{takers[0]} {text}")


def takes_words(recipe: Any) -> bool:
    return any(option.get("x-rest") for option in recipe.options["properties"].values())


def picture_option(door: Door, recipe: str, options: dict[str, Any]) -> str:
    """Return the first option that takes a picture and has no value yet; '' if there is none."""
    offered = {one.name: one for one in door.recipes()}
    properties = offered[recipe].options["properties"] if recipe in offered else {}
    free = [n for n, o in properties.items() if o.get("format") == "uri" and n not in options]
    return next(iter(free), "")


def labels(door: Door, recipe: str) -> list[str]:
    """Return the labels of a recipe's buttons."""
    return [label for one in door.recipes() if one.name == recipe for label in one.buttons]


def refusal_text(problem: Problem) -> str:
    """Return a refusal as a sentence for the person who asked."""
    words = problem.detail
    return f"{words[:1].upper()}{words[1:]}" + ("" if words.endswith((".", "?")) else ".")


async def ack_text(door: Door, prediction: Prediction) -> str:
    """Return the answer to an order: that it was accepted, and its number in the queue."""
    if prediction.status in FINAL:
        return "This was ordered before, and has ended."
    ahead = await door.ahead_of(prediction) if prediction.status == "queued" else 0
    return f"On it: number {ahead + 1} in the queue." if ahead else "On it."


FINAL = {"succeeded", "failed", "canceled"}
_ACKNOWLEDGED: deque[str] = deque(maxlen=1000)
"""Predictions acknowledged lately by this process."""


def is_first(prediction_id: str) -> bool:
    """Return whether a prediction is still to be acknowledged, and take it as acknowledged."""
    if prediction_id in _ACKNOWLEDGED:
        return False
    _ACKNOWLEDGED.append(prediction_id)
    return True


def failure_text(event: Event) -> str:
    """Return the reason for a missing picture, as a sentence for people."""
    error = event.prediction.error
    if error is None:
        return FAILURES["canceled" if event.type == "prediction.canceled" else "provider_error"]
    return FAILURES[error.code].format(message=error.message[:300])


def user_of(event: Event, via: str) -> str:
    """Return the platform's id of the person who ordered; raise Skip if not ordered by `via`."""
    order = event.prediction.order
    if order is None or order.via != via:
        raise Skip(f"it was not ordered by {via}, or was erased since")
    return (order.person or "").rpartition(":")[2].rpartition("/")[2]


# --- buttons ---


def button(sign: Callable[[str, str], str], action: str, prediction_id: str) -> str:
    """Return the value of a button: 64 bytes at most, which is Telegram's limit."""
    return sign(f"{action}{prediction_id.removeprefix('pred_')}", "button")


def result_buttons(
    sign: Callable[[str, str], str], prediction_id: str, named: list[str], *more: str
) -> dict[str, str]:
    """Return the buttons under a result, by label; `more` are further actions, such as DELETE."""
    found = {} if "Again" in named else {"Again": AGAIN}
    found |= {label: NAMED + digest(label) for label in named}
    found |= {LABELS[action]: action for action in more}
    return {label: button(sign, action, prediction_id) for label, action in found.items()}


LABELS = {CANCEL: "Cancel", DELETE: "Delete", AGAIN: "Again"}


def digest(label: str) -> str:
    return sha256(label.encode()).hexdigest()[:4]


def read_press(door: Door, value: str) -> Press:
    """Read a button's value; raise Problem if we did not sign it."""
    try:
        found = door.open(value, "button")
    except Unproved:
        raise Problem(403, "not-allowed", "this button is not valid here") from None
    return Press(found[:-32], f"pred_{found[-32:]}")


async def act(
    door: Door, press: Press, who: Who, key: str, more: Callable[[str], dict[str, Any]]
) -> Prediction | None:
    """Act on a pressed button; return the prediction that it ordered, if any.

    `more` returns the metadata and private values for an order of a recipe. For CANCEL and DELETE,
    this only checks whether the person may do it. Raises Problem.
    """
    prediction = await door.prediction(press.prediction_id)
    if prediction is None:
        raise Problem(404, "not-found", "this is no longer known")
    is_theirs = prediction.order is not None and prediction.order.person == who.person
    if press.action in {CANCEL, DELETE}:
        if not is_theirs and not (who.is_admin and press.action == CANCEL):
            raise Problem(403, "not-allowed", "only who asked for this may do that")
        return None
    recipe = prediction.order.recipe if prediction.order else ""
    label = None
    if press.action != AGAIN:
        offered = {one.name: one.buttons for one in door.recipes()}.get(recipe, {})
        label = next((each for each in offered if NAMED + digest(each) == press.action), None)
        if label is None:
            raise Problem(404, "unknown-recipe", "this button is not offered any more")
        recipe = offered[label].recipe
    place = who.place
    if who.is_direct and is_theirs and prediction.order is not None:
        # It could only be sent directly, and is still an order of the place where it was made.
        place = prediction.order.place or place
    return await door.press(
        prediction.id, label, key=key, person=who.person, place=place, **more(recipe)
    )


async def cancel(
    door: Door, prediction_id: str, report: Callable[[str], Awaitable[object]]
) -> None:
    """Cancel at the provider; `report` gets a refusal. The event is answered like any other."""
    try:
        await door.cancel(prediction_id)
    except Problem as problem:
        await report(refusal_text(problem))


# --- pictures ---


async def picture(door: Door, url: str, headers: dict[str, str] | None = None) -> str:
    """Fetch an attached picture, guarded; return it as a URL or data URI for a provider.

    Raises Problem with a text for the person.
    """
    content = bytearray()
    try:
        async with door.guarded.stream("GET", url, headers=headers) as answer:
            if not answer.is_success:
                raise not_fetched(f"HTTP {answer.status_code}")
            async for chunk in answer.aiter_bytes():
                content += chunk
                if len(content) > MOST_PICTURE:
                    most = f"{MOST_PICTURE // 1_000_000} MB"
                    raise Problem(422, "bad-option", f"a picture may have {most} at most")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise not_fetched(type(error).__name__) from None
    kind = next((kind for head, kind in PICTURES.items() if content.startswith(head)), "")
    if not kind:
        raise Problem(422, "bad-option", "what is attached is not a PNG, JPEG, WebP or GIF")
    if os.environ.get("SAVE_PUBLIC_URL", "").strip():
        try:
            return await store_picture(bytes(content), kind)
        except Exception as error:  # noqa: BLE001 - whatever fails, a data URI works
            door.log.warning("chat.picture_not_stored", reason=str(error))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


async def store_picture(content: bytes, kind: str) -> str:
    """Store a picture where `save` keeps results, named by its digest; return its public URL."""
    from .save import BASE, put  # noqa: PLC0415 - it needs more than is installed by default

    sha = sha256(content).hexdigest()
    with tempfile.TemporaryDirectory(prefix="receiver-") as folder:
        path = Path(folder, "picture")
        await asyncio.to_thread(path.write_bytes, content)
        file = Fetched(path=path, size=len(content), sha256=sha, content_type=f"image/{kind}")
        name = await put(f"asked/{sha}.{file.extension}", file)
    return f"{BASE}/{quote(name)}"


def not_fetched(why: str) -> Problem:
    return Problem(422, "bad-option", f"the attached picture cannot be fetched ({why})")


# --- the rest ---


def to_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def read_ids(pattern: str, problem: str, text: str) -> set[str]:
    """Read ids of people by comma; raise ValueError with `problem` if one is malformed."""
    found = {part.strip() for part in text.split(",") if part.strip()}
    if not all(re.fullmatch(pattern, one, re.ASCII) for one in found):
        raise ValueError(problem)
    return found


async def best_effort(door: Door, work: Awaitable[object]) -> None:
    """Send without a retry; log a failure."""
    try:
        await work
    except (Dead, Retry, httpx.HTTPError) as error:
        door.log.warning("chat.send_failed", reason=str(error))
