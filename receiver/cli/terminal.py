"""`receiver chat`: an emulated chat platform in the terminal."""

from __future__ import annotations

import html
import re
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty, Queue
from typing import Any, Final

import httpx
import msgspec
from rich.console import Console
from rich.text import Text

from receiver.cli.tables import shown
from receiver.model.errors import ReceiverError

_WAIT: Final = 20
_RENDERED: Final[dict[str, Callable[[str], str]]] = {
    "slack": html.unescape,
    "discord": partial(re.compile(r"\\(\W)").sub, r"\1"),
}
"""Turns a platform's escaped text into what people see."""
_TIMEOUT: Final = 70.0
"""Seconds; longer than a platform waits for any answer."""


class Terminal:
    """An emulated chat in the terminal: sends typed lines, prints new and changed messages."""

    def __init__(self, emulator: str, platform: str, person: str, place: str) -> None:
        self._at = f"{emulator}/_emulator/chat/{platform}"
        self._platform = platform
        self._who = {"person": person, "place": place}
        self._http = httpx.Client(timeout=_TIMEOUT, trust_env=False)
        self._console = Console(soft_wrap=True, highlight=False)
        self._news: Queue[str | dict[str, Any] | Exception | None] = Queue()
        self._seen: dict[str, str] = {}
        """The last text of each message."""
        self._buttons: list[tuple[str, int]] = []
        """The message id and index of each button; the button shown as number n is entry n - 1."""

    def run(self, linger: float) -> None:
        """Run until the input ends; if it is piped, until no message has come for `linger` seconds.

        Raises ReceiverError if no emulator answers.
        """
        version = self._look({})["version"]
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._watch, args=(version,), daemon=True).start()
        self._console.print("-- /imagine a lighthouse; a number presses a button; Ctrl-D ends")
        for one in self._until(linger):
            try:
                if isinstance(one, dict):
                    self._show(one)
                elif line := one.strip():
                    self._send(line)
            except ReceiverError as error:
                self._line("!", str(error), "red")

    def _until(self, linger: float) -> Iterator[str | dict[str, Any]]:
        """Yield typed lines and views of the chat as they arrive."""
        is_open = True
        while True:
            try:
                one = self._news.get(timeout=None if is_open else linger)
            except Empty:
                return
            if isinstance(one, Exception):
                raise one
            if one is None:
                is_open = False
                if sys.stdin.isatty():
                    return
            else:
                yield one

    def _read(self) -> None:
        for line in sys.stdin:
            self._news.put(line)
        self._news.put(None)

    def _watch(self, version: int) -> None:
        """Poll the emulator for the view of the chat, and queue each changed view."""
        try:
            while True:
                view = self._look({"after": str(version), "wait": str(_WAIT)})
                if view["version"] != version:
                    version = view["version"]
                    self._news.put(view)
        except ReceiverError as error:
            self._news.put(error)

    def _look(self, query: dict[str, str]) -> dict[str, Any]:
        return self._request("GET", "", params={**self._who, **query})

    def _request(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, self._at + path, **more)
            found = msgspec.json.decode(answer.content, type=dict[str, Any])
        except (httpx.HTTPError, msgspec.MsgspecError) as error:
            raise ReceiverError(
                f"no emulator answers at {self._at}: {error}; `receiver serve --emulate` has one"
            ) from error
        if not answer.is_success:
            raise ReceiverError(str(found.get("error", answer.status_code)))
        return found

    def _send(self, line: str) -> None:
        if not line.isdecimal():
            result = self._request("POST", "/say", json={**self._who, "text": line})
        elif (found := self._buttons[int(line) - 1 : int(line)]) and found[0][0] in self._seen:
            message, button = found[0]
            press = {**self._who, "message": message, "button": button}
            result = self._request("POST", "/press", json=press)
        else:
            raise ReceiverError(f"there is no button {line}")
        exchange = result["exchange"]
        if result["waits"]:
            self._line("!", "the update waits: no webhook is set and no client polls", "yellow")
        elif not result["is_for_bot"]:
            self._line("-", "the bot receives commands, button presses and messages to it", "dim")
        elif exchange is not None and not 200 <= exchange["status"] < 300:  # noqa: PLR2004 - the 2xx
            text = f"{exchange['url']}: {exchange['error'] or exchange['status']}"
            if exchange["status"] == httpx.codes.NOT_FOUND:
                text += f"; is {self._platform}-in served?"
            self._line("!", text, "red")

    def _show(self, view: dict[str, Any]) -> None:
        """Print the messages that are new or have changed."""
        there = set()
        for message in view["messages"]:
            there.add(message["id"])
            text = self._text(message)
            if self._seen.get(message["id"]) == text or message["author"] == view["you"]:
                continue
            is_first = message["id"] not in self._seen
            self._seen[message["id"]] = text
            mark = "<" if is_first else "~"
            self._line(mark, text + self._numbered(message), "green" if is_first else "cyan")
        for gone in [name for name in self._seen if name not in there]:
            del self._seen[gone]
            self._line("x", "a message was deleted", "dim")

    def _text(self, message: dict[str, Any]) -> str:
        private = "(only you) " if message["only_for"] else ""
        rendered = _RENDERED.get(self._platform, str)
        text = "…" if message["is_waiting"] else rendered(message["text"])
        files = [file["view"] or file["url"] for file in message["files"]]
        return private + "\n".join(filter(None, [text, *files]))

    def _numbered(self, message: dict[str, Any]) -> str:
        """Return the buttons of a message, each with a number that never changes."""
        labels = []
        for place, button in enumerate(message["buttons"]):
            if (message["id"], place) not in self._buttons:
                self._buttons.append((message["id"], place))
            number = self._buttons.index((message["id"], place)) + 1
            labels.append(f"[{number}] {button['label']}")
        return "\n" + "  ".join(labels) if labels else ""

    def _line(self, mark: str, text: str, style: str) -> None:
        for line in text.split("\n"):
            self._console.print(Text(f"{mark} ", style).append_text(shown(line)))
