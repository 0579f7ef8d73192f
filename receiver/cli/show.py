"""`receiver show`: one prediction with its input, its outputs, a timeline and its deliveries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from receiver.cli.tables import STATES, age, print_table, shown
from receiver.model.values import plain

Content = Mapping[str, Any]

_LONGEST_DATA: Final = 80
"""Characters of the longest data URI that is shown whole."""
_LABEL: Final = 10
_STEPS: Final = {
    "created_at": "created",
    "submitted_at": "submitted",
    "completed_at": "",
    "erased_at": "erased",
}
_WEB: Final = ("http://", "https://")


def show(prediction: Content, deliveries: Sequence[Content], *, wide: bool) -> None:
    """Print a prediction with its deliveries; long values are cut on a terminal."""
    console = Console(highlight=False)
    cuts = console.is_terminal and not wide
    width = max(console.width, 80)

    def print_row(label: str, text: Text, *, whole: bool = False) -> None:
        if cuts and not whole:
            text.truncate(width - _LABEL, overflow="ellipsis")
        console.print(Text(f"{label:<{_LABEL}}", "bold") + text, soft_wrap=True)

    console.print(_title(prediction), soft_wrap=True)
    for label, text in _facts(prediction):
        print_row(label, shown(text))
    for address in addresses(prediction):
        print_row("output", shown(address, "blue"), whole=True)
    for stage, line in enumerate(_timeline(prediction, deliveries)):
        print_row("" if stage else "timeline", line)
    if deliveries:
        console.print(Text("deliveries", "bold"))
    print_table(
        deliveries,
        ("handler", "state", "attempts", "due_at", "reason"),
        ("id", "round"),
        wide=wide,
        indent="  ",
    )


def addresses(prediction: Content) -> Iterator[str]:
    """Yield the URL of each output, if possible an http(s) one of the stored copy; or its text."""
    for output in prediction.get("output") or ():
        kept, made = (output.get("stored") or {}).get("url"), output.get("url")
        web = next((url for url in (kept, made) if str(url or "").startswith(_WEB)), None)
        yield _brief(web or kept or made or output.get("text"))


def _title(prediction: Content) -> Text:
    status = prediction.get("status")
    words = [prediction.get(name, "") for name in ("id", "provider", "model")]
    return Text("  ").join([*map(shown, words), shown(status, STATES.get(str(status), ""))])


def _facts(prediction: Content) -> Iterator[tuple[str, str]]:
    for group in ("input", "metadata"):
        given = prediction.get(group) or {}
        for place, (name, value) in enumerate(given.items()):
            yield "" if place else group, f"{name}={_brief(plain(value))}"
    for name, label in (("provider_id", "their id"), ("parent_id", "parent")):
        if prediction.get(name):
            yield label, str(prediction[name])
    if prediction.get("reply_to"):
        yield "reply to", str(prediction["reply_to"])
    if error := prediction.get("error"):
        yield "error", f"{error.get('code')}: {error.get('message')}"


def _timeline(prediction: Content, deliveries: Sequence[Content]) -> Iterator[Text]:
    """Yield a line for each step of the prediction and each attempt, in order of time."""
    end = str(prediction.get("status"))
    channel = f"by {prediction['channel']}" if prediction.get("channel") else ""
    happened = [
        (str(prediction[name]), *((word, "", "") if word else ("", end, channel)))
        for name, word in _STEPS.items()
        if prediction.get(name)
    ]
    for delivery in deliveries:
        for attempt in delivery.get("history") or ():
            why = ": ".join(str(attempt[name]) for name in ("reason", "note") if attempt.get(name))
            who = f"{delivery['handler']} #{attempt['number']}"
            happened.append((str(attempt["ended_at"]), who, str(attempt["result"]), why))
    happened.sort(key=itemgetter(0))
    for at, who, state, why in happened:
        times = f"{at[:10]} {at[11:19]}  {since(happened[0][0], at):>8}"
        words = [(who, ""), (state, STATES.get(state, "")), (why, "")]
        yield Text("  ").join([shown(times, "dim"), *(shown(*word) for word in words if word[0])])


def since(begun: Any, at: Any) -> str:
    """Return the time from one time to another, as +1.2 s; empty if there is one only."""
    try:
        seconds = (datetime.fromisoformat(at) - datetime.fromisoformat(begun)).total_seconds()
    except (ValueError, TypeError):
        return ""
    return f"+{seconds:.1f} s" if seconds < 600 else f"+{age(begun, datetime.fromisoformat(at))}"  # noqa: PLR2004


def _brief(value: Any) -> str:
    """Return a value as text; of a long data URI, only its media type and length."""
    text = str(value)
    if text.startswith("data:") and len(text) > _LONGEST_DATA:
        return f"{text.partition(',')[0][:_LONGEST_DATA]},… ({len(text):,} characters: see --json)"
    return text
