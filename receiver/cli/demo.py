"""The demo: emulated providers, a receiver and a server for forwarded events, on one screen.

The three servers on loopback sockets, the built-in handlers and the database are real; only the
providers and Slack are emulated.
"""

from __future__ import annotations

import base64
import io
import os
import secrets
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from standardwebhooks import Webhook, WebhookVerificationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.app import create_app
from receiver.cli.client import Client
from receiver.cli.emulating import emulated, environment, served
from receiver.cli.init import next_commands
from receiver.cli.output import program
from receiver.cli.show import since
from receiver.cli.tables import STATES
from receiver.emulator import chat_settings_for
from receiver.http.listening import listening, url_of
from receiver.model.text import spelled
from receiver.observability import logging as logs
from receiver.settings import Settings, tls

_OXEN_IMAGE: Final = {"aspect_ratio": "16:9"}
SEEDS: Final[tuple[tuple[str, str, dict[str, Any], str], ...]] = (
    ("oxen", "nano-banana", {"prompt": "a lighthouse in a storm", **_OXEN_IMAGE}, ""),
    (
        "oxen",
        "google-nano-banana-pro",
        {"prompt": "the same lighthouse, at dawn", "resolution": "2K", **_OXEN_IMAGE},
        "",
    ),
    ("oxen", "nano-banana-2", {"prompt": "a harbour from above", "resolution": "1K"}, ""),
    (
        "eachlabs",
        "nano-banana",
        {"prompt": "a fox in the snow", "num_images": 1, "output_format": "png"},
        "",
    ),
    ("fal", "fal-ai/nano-banana", {"prompt": "a paper boat on a lake", "num_images": 1}, ""),
    ("fal", "fal-ai/nano-banana", {"prompt": "a kite [repeat_callback]"}, "sent three times"),
    ("eachlabs", "nano-banana", {"prompt": "an owl [lose_callback]"}, "lost, so polled"),
    ("fal", "fal-ai/nano-banana", {"prompt": "a ship in a bottle [fail]"}, "the model fails"),
    ("replicate", "google/nano-banana", {"prompt": "a bridge in fog"}, ""),
    ("ideogram", "nano-banana-2", {"prompt": "a poster with a whale"}, ""),
    ("bfl", "flux-2-pro", {"prompt": "a meadow after rain"}, ""),
    ("wavespeed", "google/nano-banana-pro/text-to-image", {"prompt": "a snail on a leaf"}, ""),
    ("openrouter", "google/veo-3.1", {"prompt": "waves on a beach", "duration": 4}, ""),
)
_CHAT: Final = "/imagine a lighthouse on the moon"
"""The command that is typed in the emulated Slack."""
_RECIPES: Final = """\
[imagine]
about = "A picture from words"
provider = "fal"
model = "fal-ai/nano-banana"
input = { prompt = "{prompt}" }
options = { prompt = { required = true, rest = true } }

[[allow]]
place = "slack:*"
"""
_PATIENCE: Final = 45.0
PROJECT: Final = "my-receiver"
_FEED: Final = 12
PROOFS: Final = {
    "fal webhook": "fal.ai's signature",
    "eachlabs webhook": "Eachlabs' secret, one for each prediction",
    "replicate webhook": "the secret of the account at Replicate",
    "ideogram webhook": "Ideogram's signature",
    "bfl webhook": "BFL's signature, with a secret of each prediction",
    "wavespeed webhook": "the secret of the account at WaveSpeed",
    "openrouter webhook": "the secret of the workspace at OpenRouter",
    "oxen sse": "our own connection to Oxen.ai's stream",
}
"""What proves an outcome, by its provider and channel."""
_MARKS: Final = {"done": "✓", "skipped": "-", "dead": "✗"}


def run(folder: str | None, seconds: float, console: Console | None = None) -> int:
    """Run the demo; return the exit code: 0 if every prediction and delivery ended in time."""
    console = console or Console()
    home = Path(folder or tempfile.mkdtemp(prefix="receiver-demo-"))
    with _stage(home, seconds) as stage:
        with Live(console=console, refresh_per_second=10, transient=False) as screen:
            done = _play(stage, screen)
        _print_summary(console, home, stage, done=done)
    return 0 if done else 1


class _Stage:
    """The state that the screen shows: predictions, their deliveries and the feed."""

    def __init__(self, client: Client, url: str, emulator: str, feed: _Feed, sink: _Sink) -> None:
        self.client = client
        self.url = url
        self._chat = f"{emulator}/_emulator/chat/slack"
        self.feed = feed
        self.sink = sink
        self.notes: dict[str, str] = {}
        self.predictions: list[Any] = []
        self.deliveries: list[Any] = []

    def submit(self) -> None:
        for provider, model, given, note in SEEDS:
            body = {"provider": provider, "model": model, "input": given}
            self.notes[self.client.send("predictions", body=body)["id"]] = note

    def chat(self) -> None:
        """Type a command in Slack."""
        body = {"text": _CHAT, "person": "U1", "place": "C1"}
        httpx.post(f"{self._chat}/say", json=body, trust_env=False)

    def count_in_chat(self) -> int:
        """Return how many pictures are shown in Slack."""
        answer = httpx.get(self._chat, trust_env=False)
        shown = msgspec.json.decode(answer.content)["messages"]
        return sum(len(message["files"]) for message in shown)

    def refuses_forgery(self) -> bool:
        """Send a forged callback, with a guessed token and unsigned; return whether it failed."""
        forged = {"request_id": "guessed", "status": "OK", "payload": {"images": []}}
        answer = httpx.post(f"{self.url}/webhooks/fal/guessed", json=forged, trust_env=False)
        return answer.status_code == httpx.codes.UNAUTHORIZED

    def count_duplicates(self) -> int:
        found = self.client.fetch("discarded", kind="duplicate", limit=100)["data"]
        return sum(row["times"] for row in found)

    def came_by(self) -> Counter[str]:
        """Count the outcomes by their proof."""
        ways = [f"{one['provider']} {one['channel']}" for one in self.predictions]
        return Counter(PROOFS.get(way, "a poll, as no callback came") for way in ways)

    def look(self) -> bool:
        """Read predictions and deliveries from the API; return whether all have ended."""
        self.predictions = self.client.fetch("predictions", limit=50)["data"][::-1]
        self.deliveries = self.client.fetch("deliveries", limit=100)["data"]
        ended = [p for p in self.predictions if p["completed_at"] is not None]
        return len(ended) == len(SEEDS) + 1 and all(row["ended_at"] for row in self.deliveries)

    def draw(self) -> Group:
        table = Table(expand=True, box=None, header_style="dim")
        for column in ("provider", "prompt", "status", "came by", "handlers"):
            table.add_column(column, no_wrap=column != "prompt")
        for prediction in self.predictions:
            table.add_row(*self._row(prediction))
        feed = Panel("\n".join(self.feed.lines), title="what happens", border_style="dim")
        return Group(table, feed)

    def _row(self, prediction: Mapping[str, Any]) -> list[Text]:
        note = "ordered in Slack" if prediction["order"] else self.notes.get(prediction["id"], "")
        prompt = Text(str(prediction["input"]["prompt"]).partition(" [")[0])
        if note:
            prompt.append(f"  ({note})", style="dim")
        status = prediction["status"]
        handlers = Text(" ").join(
            Text(f"{_MARKS.get(row['state'], '…')} {row['handler']}", STATES.get(row["state"], ""))
            for row in sorted(self.deliveries, key=itemgetter("handler"))
            if row["prediction_id"] == prediction["id"]
        )
        took = since(prediction["submitted_at"], prediction["completed_at"])
        came_by = f"{prediction['channel'] or ''} {took.removeprefix('+')}"
        return [
            Text(prediction["provider"], style="bold"),
            prompt,
            Text(status, style=STATES.get(status, "")),
            Text(came_by),
            handlers,
        ]


def _play(stage: _Stage, screen: Live) -> bool:
    stage.submit()
    stage.chat()
    ends = time.monotonic() + _PATIENCE
    while time.monotonic() < ends:
        done = stage.look()
        screen.update(stage.draw())
        if done:
            return True
        threading.Event().wait(0.1)
    return False


def _can_save() -> bool:
    return all(find_spec(name) for name in ("obstore", "PIL"))


def _print_summary(console: Console, home: Path, stage: _Stage, *, done: bool) -> None:
    pictures = sorted((home / "pictures").glob("*.png"))
    place = escape(spelled(str(home / "pictures")))
    console.print()
    saved = f", [bold]{len(pictures)}[/] pictures in {place}" if _can_save() else ""
    console.print(
        f"[bold]{len(stage.predictions)}[/] predictions{saved}, "
        f"[bold]{stage.sink.verified}[/] signed events forwarded and verified"
        + (f", [red]{stage.sink.refused} refused[/]" if stage.sink.refused else "")
    )
    for proof, count in stage.came_by().most_common():
        console.print(f"  {count} proved by {proof}")
    console.print(
        f"  {stage.count_duplicates()} duplicates recorded, which changed nothing; "
        "a forged callback was " + ("refused" if stage.refuses_forgery() else "[red]not refused[/]")
    )
    in_chat = stage.count_in_chat()
    console.print(
        f"  in Slack, emulated too, {_CHAT!r} was answered at once, and then by "
        + ("its picture" if in_chat == 1 else f"[red]{in_chat} pictures[/]")
    )
    if not _can_save():
        console.print("To save pictures too: pip install 'prediction-receiver\\[storage]'")
    if done:
        serve, _ = next_commands(Path(PROJECT))
        console.print("Next, a handler of your own:")
        for command in (f"{program()} init {PROJECT}", serve):
            console.print(Text(f"  {command}", "bold"), soft_wrap=True)
    else:
        console.print(f"[red]It did not all end within {_PATIENCE:g} s; the log is above.[/]")


class _Feed(io.TextIOBase):
    """A stream for the receiver's JSON log that keeps the last few lines as readable text."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=_FEED)

    def write(self, text: str) -> int:
        for line in text.splitlines():
            try:
                text_line = _feed_line(msgspec.json.decode(line))
            except (msgspec.DecodeError, KeyError):
                continue
            if text_line:
                self.lines.append(text_line)
        return len(text)


_WORDS: Final = {
    "submit.accepted": "[cyan]→ {provider:10}[/] took {prediction:.22}… as {provider_id:.13}…",
    "outcome.taken": "[magenta]← {provider:10}[/] said {outcome} by {channel}: {verdict}",
    "handler.attempt": "[green]✓ {handler:10}[/] {result}, {seconds} s, attempt {attempt}",
    "stream.connected": "[cyan]↔ {provider:10}[/] is listened to",
}


def _feed_line(line: Mapping[str, Any]) -> str | None:
    template = _WORDS.get(line["event"])
    shown = {name: escape(spelled(str(value))) for name, value in line.items()}
    return template.format_map(shown) if template else None


class _Sink:
    """A server that receives events from `forward` and verifies them by Standard Webhooks."""

    def __init__(self, secret: str) -> None:
        self._webhook = Webhook(secret)
        self.verified = 0
        self.refused = 0
        self.app = Starlette(routes=[Route("/events", self._take, methods=["POST"])])

    async def _take(self, request: Request) -> Response:
        try:
            self._webhook.verify(await request.body(), dict(request.headers))
        except WebhookVerificationError:
            self.refused += 1
            return Response(status_code=401)
        self.verified += 1
        return Response(status_code=204)


@contextmanager
def _stage(home: Path, seconds: float) -> Iterator[_Stage]:
    tls.require(os.environ)
    home.mkdir(parents=True, exist_ok=True)
    signing = f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
    sink = _Sink(signing)
    feed = _Feed()
    logs.configure("json", "info", feed)  # type: ignore[arg-type] # all that logging needs of a stream
    with ExitStack() as stack:
        sockets = stack.enter_context(listening("127.0.0.1", 0))
        url = url_of(sockets[0])
        emulator = stack.enter_context(emulated(seconds, url))
        sinks = stack.enter_context(listening("127.0.0.1", 0))
        sink_url = stack.enter_context(served(sink.app, sinks))
        (home / "recipes.toml").write_text(_RECIPES)
        os.environ |= {
            **chat_settings_for(emulator),
            "SAVE_URL": str(home / "pictures"),
            "FORWARD_URL": f"{sink_url}/events",
            "FORWARD_SECRET": signing,
        }
        settings = Settings.read(
            {
                **environment(emulator, url),
                "RECEIVER_DEV": "1",
                "RECEIVER_API_KEYS": (key := secrets.token_hex(16)),
                "RECEIVER_DATABASE_URL": f"sqlite:///{home / 'receiver.db'}",
                "RECEIVER_POLL_AFTER": "4",
                "RECEIVER_RECIPES": str(home / "recipes.toml"),
            }
        )
        handlers = [*["save"] * _can_save(), "forward", "slack-in"]
        stack.enter_context(served(create_app(settings, handlers), sockets))
        client = stack.enter_context(Client({"RECEIVER_URL": url, "RECEIVER_API_KEY": key}))
        yield _Stage(client, url, emulator, feed, sink)
