"""The control API of the emulated chat platforms: user actions, the view, invalid requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from receiver.emulator import chat_settings_for
from receiver.emulator.chats.slack.api import TOKEN
from tests import loopback
from tests.emulator.chatting import Outside, outside, said
from tests.patience import PATIENCE


@pytest.fixture(scope="module")
def here() -> Iterator[Outside]:
    with outside(said({"text": "on it"})) as found:
        yield found


def get(here: Outside, path: str) -> Any:
    return loopback.get(f"{here.url}/_emulator/chat{path}", timeout=PATIENCE).json()


def test_long_poll_of_a_view_waits_for_a_new_message(
    here: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = get(here, "/slack")["version"]
    found: list[Any] = []
    board, waits = here.chats.boards["slack"], threading.Event()
    until_after = board.until_after

    async def noted(*given: Any) -> None:
        waits.set()
        await until_after(*given)

    monkeypatch.setattr(board, "until_after", noted)
    look = f"/slack?after={version}&wait=30&person=U1&place=C1"
    waiting = threading.Thread(target=lambda: found.append(get(here, look)))
    waiting.start()
    assert waits.wait(PATIENCE)
    assert get(here, "/slack")["version"] == version
    assert found == []
    here.say("slack", "/imagine a lighthouse")
    waiting.join(PATIENCE)
    [view] = found
    assert view["version"] > version
    [message] = view["messages"]
    assert (message["text"], message["only_for"], message["by"]) == ("on it", "U1", "response")
    assert get(here, "/slack?person=U2&place=C1")["messages"] == []


def test_file_view_requires_no_token(here: Outside) -> None:
    api, bearer = chat_settings_for(here.url)["SLACK_URL"], {"authorization": f"Bearer {TOKEN}"}
    with httpx.Client(headers=bearer, base_url=api, verify=loopback.TLS) as http:
        about = {"filename": "a.png", "length": "3"}
        place = http.post("/files.getUploadURLExternal", data=about).json()
        assert http.post(place["upload_url"], content=b"abcd").status_code == 400
        http.post(place["upload_url"], content=b"abc")
        named = {"files": [{"id": place["file_id"]}], "channel_id": "C2"}
        assert http.post("/files.completeUploadExternal", json=named).json()["ok"]
    [message] = get(here, "/slack?place=C2")["messages"]
    [file] = message["files"]
    assert loopback.get(file["view"]).content == b"abc"
    assert loopback.get(file["view"] + "x").status_code == 404


def test_say_reports_an_update_that_waits_to_be_polled(here: Outside) -> None:
    for text, is_order in {"hello": False, "/imagine a": True, "there": False}.items():
        told = here.do("POST", "/telegram/say", {"text": text})
        assert told == {"exchange": None, "is_for_bot": is_order, "waits": is_order}
    assert len(here.chats.telegram.updates) == 1


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/irc/say", {"text": "a"}),
        ("POST", "/slack/say", {}),
        ("POST", "/slack/say", [1]),
        ("POST", "/slack/press", {"message": "1", "button": 0}),
        ("PUT", "/tokens", {"discord": "now"}),
        ("POST", "/clock", {"seconds": "long"}),
    ],
)
def test_invalid_control_request_returns_400(
    here: Outside, method: str, path: str, body: Any
) -> None:
    url = f"{here.url}/_emulator/chat{path}"
    assert loopback.request(method, url, json=body).status_code == 400
    assert loopback.request(method, url, content=b"\xff{").status_code == 400


def test_unknown_platform_returns_404(here: Outside) -> None:
    assert loopback.get(f"{here.url}/_emulator/chat/irc").status_code == 404
