"""A user of the dashboard without a browser, who follows links and sends forms."""

from __future__ import annotations

import re
from dataclasses import dataclass
from html import unescape
from typing import Any

import httpx

from tests.receiving import API_KEY, STRANGER, Station

VIEWER_KEY = "viewer-key-of-a-person-who-looks"
ON = {"RECEIVER_DASHBOARD": "on", "RECEIVER_VIEWER_KEYS": f"guest:{VIEWER_KEY}"}
NAMED = {"RECEIVER_API_KEYS": f"web:{API_KEY}"}


@dataclass
class Person:
    """A user whose client keeps cookies and runs no scripts."""

    http: httpx.AsyncClient

    async def see(self, path: str, expected: int = 200, /, **query: str) -> str:
        answer = await self.http.get(f"/ui{path}", params=query or None)
        assert answer.status_code == expected, (answer.status_code, answer.text[:2000])
        return answer.text

    async def token(self, path: str = "/sign-in") -> str:
        return hidden(await self.see(path), "token")

    async def sign_in(self, key: str = API_KEY, after: str = "") -> httpx.Response:
        form = {"token": await self.token(), "key": key, "next": after}
        return await self.http.post("/ui/sign-in", data=form)

    async def act(self, path: str, page: str = "/handlers", **form: str) -> httpx.Response:
        """Send a form with the token of a page."""
        page_text = await self.see(page)
        token = hidden(page_text, "token")
        return await self.http.post(f"/ui{path}", data={"token": token, "back": page, **form})

    async def press(self, page: str, label: str) -> httpx.Response:
        """Press the button with this label on a page."""
        path, form = button(await self.see(page), label)
        return await self.http.post(path, data=form)


def hidden(page: str, name: str) -> str:
    found = re.search(rf'name="{name}" value="([^"]*)"', page)
    assert found, page[:3000]
    return unescape(found[1])


def forms(page: str) -> list[tuple[str, dict[str, str], str]]:
    """Return the forms of a page: action, hidden fields, and the text of the button."""
    found = []
    for action, inside in re.findall(
        r'<form[^>]*action="([^"]*)"[^>]*>(.*?)</form>', page, re.DOTALL
    ):
        fields = re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)"', inside)
        label = re.search(r"<button[^>]*>(.*?)</button>", inside, re.DOTALL)
        data = {unescape(name): unescape(value) for name, value in fields}
        found.append((unescape(action), data, label[1].strip() if label else ""))
    return found


def button(page: str, label: str) -> tuple[str, dict[str, str]]:
    for action, fields, text in forms(page):
        if text == label:
            return action, fields
    raise AssertionError((label, [text for *_, text in forms(page)]))


def buttons(page: str) -> list[str]:
    return [text for *_, text in forms(page)]


def person(station: Station, **more: Any) -> Person:
    transport = httpx.ASGITransport(station.app, client=STRANGER)
    given = {"base_url": "https://hooks.test", **more}
    return Person(httpx.AsyncClient(transport=transport, **given))
