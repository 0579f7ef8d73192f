"""`receiver chat`: a chat in the terminal with a handler of `receiver serve --emulate`."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from starlette.responses import Response

from receiver.emulator.chats.board import numbered
from receiver.emulator.chats.telegram.api import TOKEN
from receiver.emulator.pictures import draw, name_for
from tests.cli.running import environment, receiver, running
from tests.emulator.chatting import Outside, outside, said
from tests.patience import PATIENCE

PNG = draw(name_for("a lighthouse")) or b""
ROW = {"type": 1, "components": [{"type": 2, "style": 1, "label": "Again", "custom_id": "a:t"}]}
DONE = {
    "content": "done",
    "embeds": [{"description": r"a lighthouse, 16\:9"}],
    "components": [ROW],
}


@pytest.fixture
def here() -> Iterator[Outside]:
    with outside(
        said({"type": 4, "data": DONE}), said({"type": 7, "data": {"content": "changed"}})
    ) as found:
        yield found


@dataclass
class Talking:
    """A running `receiver chat`."""

    process: subprocess.Popen[str]
    log: Path

    def types(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def wait_for(self, text: str) -> str:
        ends = time.monotonic() + PATIENCE
        while text not in (shown := self.log.read_text()):
            assert time.monotonic() < ends, shown
            assert self.process.poll() is None, shown
            time.sleep(0.02)
        return shown


@contextmanager
def talking(*args: str, cwd: Path) -> Iterator[Talking]:
    log = cwd / "chat.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "receiver", "chat", *args, "--linger", "0.1"],
            cwd=cwd,
            env=environment({}),
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            text=True,
        )
    try:
        yield Talking(process, log)
        assert process.stdin
        process.stdin.close()
        assert process.wait(PATIENCE) == 0, log.read_text()
    finally:
        process.kill()
        process.communicate()


def test_chat_sends_typed_lines_and_prints_the_answers(here: Outside, tmp_path: Path) -> None:
    with talking("--as", "discord", "--emulator", here.url, cwd=tmp_path) as chat:
        chat.types("/imagine a lighthouse")
        shown = chat.wait_for("[1] Again")
        assert "< done\n< a lighthouse, 16:9\n" in shown
        chat.types("1")
        chat.wait_for("~ changed")
        chat.types("2")
        chat.wait_for("! there is no button 2")
        chat.types("hello")
        chat.wait_for("- the bot receives commands, button presses and messages to it")
        here.app.answers[:] = [Response(status_code=401)]
        chat.types("/imagine \x1b[31m")
        chat.wait_for("/in/discord: 401")
        shown = chat.wait_for("(only you) The application did not respond")
    assert "\x1b" not in shown
    assert [one.json["type"] for one in here.app.told] == [2, 3, 2]


def test_picture_in_a_chat_has_a_working_url(here: Outside, tmp_path: Path) -> None:
    api = f"{here.url}/telegram/bot{TOKEN}/sendPhoto"
    with talking("--as", "telegram", "--emulator", here.url, cwd=tmp_path) as chat:
        chat.wait_for("-- ")
        form = {"chat_id": str(-numbered("C1")), "caption": "done"}
        answer = httpx.post(api, data=form, files={"photo": ("a.png", PNG)})
        assert answer.is_success, answer.text
        shown = chat.wait_for("/files/")
    [address] = re.findall(r"< (http\S+)", shown)
    assert httpx.get(address).content == PNG


def test_chat_without_an_emulator_exits_1_with_advice(tmp_path: Path) -> None:
    done = receiver("chat", "--emulator", "http://127.0.0.1:9", cwd=tmp_path)
    assert done.returncode == 1
    assert "`receiver serve --emulate` has one" in done.stderr


HANDLER = """\
import os

from receiver import Event, on


@on("*", name="shows")
def show(event: Event) -> None:
    print(os.environ["SLACK_URL"], os.environ["SLACK_TOKEN"], os.environ["TELEGRAM_TOKEN"])
"""


def test_serve_emulate_sets_chat_variables_and_prints_the_chat_command(tmp_path: Path) -> None:
    (tmp_path / "shows.py").write_text(HANDLER)
    with running(
        "serve", "--emulate", "--try", "shows.py", cwd=tmp_path, TELEGRAM_TOKEN="1:own"
    ) as server:
        shown = server.wait_for(" chat --emulator ", "/slack/api xoxb-emulated 1:own")
        [where] = [line.split()[-1] for line in shown.splitlines() if " chat --emulator" in line]
        with talking("--emulator", where, cwd=tmp_path) as chat:
            chat.types("/imagine a lighthouse")
            chat.wait_for(f"! {server.url}/in/slack: 404; is slack-in served?")


def test_chat_order_without_settings_is_answered_with_its_picture(tmp_path: Path) -> None:
    with running("serve", "--emulate", "slack-in", cwd=tmp_path) as server:
        shown = server.wait_for(" chat --emulator ")
        [where] = [line.split()[-1] for line in shown.splitlines() if " chat --emulator" in line]
        with talking("--emulator", where, cwd=tmp_path) as chat:
            chat.types("/imagine a lighthouse")
            chat.wait_for("On it.")
            chat.wait_for("/files/")


def test_polled_order_is_answered_and_its_cancel_button_is_gone(tmp_path: Path) -> None:
    with running("serve", "--emulate", "slack-in", "telegram-in", cwd=tmp_path) as server:
        shown = server.wait_for(" chat --emulator ")
        [where] = [line.split()[-1] for line in shown.splitlines() if " chat --emulator" in line]
        with talking("--as", "telegram", "--emulator", where, cwd=tmp_path) as chat:
            chat.types("/imagine a lighthouse")
            chat.wait_for("x a message was deleted")
            chat.types("1")
            shown = chat.wait_for("! there is no button 1")
        assert "- the bot receives" not in shown
        with talking("--emulator", where, cwd=tmp_path) as chat:
            chat.types("/imagine help")
            chat.wait_for("< imagine <prompt>")
