"""Control of the chat platforms: what people do, what is shown, and what is not asked well."""

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


def test_a_view_waits_for_what_is_new(here: Outside) -> None:
    version = get(here, "/slack")["version"]
    found: list[Any] = []
    look = f"/slack?after={version}&wait=30&person=U1&place=C1"
    waiting = threading.Thread(target=lambda: found.append(get(here, look)))
    waiting.start()
    here.say("slack", "/imagine a lighthouse")
    waiting.join(PATIENCE)
    [view] = found
    assert view["version"] > version
    [message] = view["messages"]
    assert (message["text"], message["only_for"], message["by"]) == ("on it", "U1", "response")
    assert get(here, "/slack?person=U2&place=C1")["messages"] == []


def test_files_can_be_looked_at_by_anybody(here: Outside) -> None:
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


def test_an_update_that_nobody_takes_is_told(here: Outside) -> None:
    for text, waits in {"hello": False, "/imagine a": True, "there": False}.items():
        told = here.do("POST", "/telegram/say", {"text": text})
        assert told == {"exchange": None, "waits": waits}
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
def test_what_makes_no_sense_is_a_400(here: Outside, method: str, path: str, body: Any) -> None:
    url = f"{here.url}/_emulator/chat{path}"
    assert loopback.request(method, url, json=body).status_code == 400
    assert loopback.request(method, url, content=b"\xff{").status_code == 400


def test_no_platform_of_that_name_is_a_404(here: Outside) -> None:
    assert loopback.get(f"{here.url}/_emulator/chat/irc").status_code == 404
