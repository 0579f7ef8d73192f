"""A receiver is killed (kill -9) while it answers chats: no order or post is lost or doubled."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from receiver.cli.emulating import served
from receiver.emulator import chat_settings_for, create_emulator, settings_for
from receiver.emulator.chats.board import Message, Platform
from receiver.emulator.chats.calling import Exchange
from receiver.emulator.chats.platforms import Chats
from receiver.http.listening import listening, url_of
from tests.emulator.serving import FAST
from tests.handlers.parts import built_in
from tests.handlers.talking import RECIPES
from tests.journey.parts import API_KEY, SECRETS, Process, eventually
from tests.loopback import free_port
from tests.patience import PATIENCE
from tests.receiving import eventually as eventually_there


@dataclass
class Scene:
    """A receiver in its own process, with emulated chats."""

    process: Process
    database: Path
    chats: Chats
    url: str

    def say(self, platform: Platform, text: str) -> None:
        with suppress(httpx.HTTPError):
            httpx.post(
                f"{self.url}/_emulator/chat/{platform}/say",
                json={"text": text, "person": "U1", "place": "C1"},
                timeout=PATIENCE,
            )

    def one(self, sql: str) -> Any:
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            return connection.execute(sql).fetchone()[0]

    def shown(self, platform: Platform) -> list[Message]:
        return [one for one in self.chats.boards[platform].shown() if one.pictures]

    def settled(self) -> None:
        eventually(lambda: self.one("SELECT count(*) FROM deliveries WHERE state = 'done'") == 1)


@contextmanager
def living(folder: Path, handler: str) -> Iterator[Scene]:
    port, database = free_port(), folder / "receiver.db"
    with listening("127.0.0.1", 0) as sockets:
        url = url_of(sockets[0])
        own = {"receiver": f"http://127.0.0.1:{port}", "own": url, "time_scale": 0.03}
        emulator = create_emulator(msgspec.structs.replace(FAST, **own))
        env = {
            **settings_for(url),
            **chat_settings_for(url),
            **RECIPES,
            "FAL_KEY": "k",
            "RECEIVER_API_KEYS": API_KEY,
            "RECEIVER_SECRET_KEY": SECRETS[1],
            "RECEIVER_PUBLIC_URL": f"http://127.0.0.1:{port}",
            "RECEIVER_DATABASE_URL": f"sqlite:///{database}",
            "RECEIVER_ALLOW_PRIVATE_FETCH": "1",
            "RECEIVER_RETRY_BASE": "0.1",
        }
        arguments = ["-m", "receiver", "serve", built_in(handler), "--port", str(port)]
        process = Process(arguments, folder / "serve.log", env, port)
        with served(emulator, sockets):
            process.start()
            try:
                yield Scene(process, database, emulator.state.chats, url)
            finally:
                process.kill()


@pytest.mark.parametrize("platform", ["slack", "discord"])
def test_kill_after_a_post_and_before_its_record_does_not_post_twice(
    tmp_path: Path, platform: Platform
) -> None:
    with living(tmp_path, f"{platform}_in") as scene:
        board = scene.chats.boards[platform]
        pid, killed = int(scene.process.pid), threading.Event()

        def then_kill(do: Callable[..., Message]) -> Callable[..., Message]:
            def done(message: Message, **more: Any) -> Message:
                found = do(message, **more)
                if message.pictures and not killed.is_set():  # posted, not yet recorded
                    os.kill(pid, signal.SIGKILL)
                    killed.set()
                return found

            return done

        board.post = then_kill(board.post)  # type: ignore[method-assign]
        board.edit = then_kill(board.edit)  # type: ignore[method-assign]
        scene.say(platform, "/imagine a lighthouse")
        assert killed.wait(PATIENCE)
        scene.process.kill()
        scene.process.start()
        scene.settled()
        assert len(scene.shown(platform)) == 1


def test_kill_after_the_commit_of_an_order_does_not_order_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slack does not get the answer to the order, and so sends it again."""
    with living(tmp_path, "slack_in") as scene:
        slack, pid, restarted = scene.chats.scene, int(scene.process.pid), threading.Event()
        slack.within = PATIENCE
        call, statuses = slack.caller.call, list[int]()

        async def call_then_kill(*given: Any) -> Exchange:
            if statuses:  # Slack's retry
                await asyncio.to_thread(restarted.wait, PATIENCE)
            exchange = await call(*given)
            statuses.append(exchange.status)
            if len(statuses) > 1:
                return exchange
            # A kill during the submit would leave the prediction unconfirmed.
            await eventually_there(lambda: scene.one("SELECT provider_id FROM predictions"))
            os.kill(pid, signal.SIGKILL)
            return replace(exchange, status=0, answer=b"", error="ReadError: killed")

        monkeypatch.setattr(slack.caller, "call", call_then_kill)
        scene.say("slack", "<@UBOT> a lighthouse")
        scene.process.kill()
        scene.process.start()
        restarted.set()
        eventually(lambda: statuses == [200, 200])
        assert scene.one("SELECT count(*) FROM predictions") == 1
        scene.settled()
        assert len(scene.shown("slack")) == 1
