"""A real server and a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
from playwright.sync_api import Browser, Page, expect, sync_playwright

from receiver.settings.development import api_key
from tests.cli.running import Running, running
from tests.patience import PATIENCE

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser")
HANDLER: Final = """\
from pathlib import Path

from receiver import Dead, Event, on


@on("succeeded", name="mine")
def mine(event: Event) -> None:
    if "[dead]" in event.prediction.input["prompt"] and not Path("well").exists():
        raise Dead("not yet: " + event.prediction.input["prompt"])
"""
RECIPES: Final = """\
[imagine]
about = "A picture of what you say"
provider = "fal"
model = "fal-ai/nano-banana"
input = { prompt = "{prompt}" }
[imagine.options.prompt]
required = true
rest = true
"""
VIOLATIONS: Final = """\
window.violations = [];
document.addEventListener("securitypolicyviolation", (e) => window.violations.push(e.blockedURI));
"""
expect.set_options(timeout=PATIENCE * 1000)


@dataclass
class Desk:
    """A server and a browser."""

    server: Running
    browser: Browser
    folder: Path
    key: str

    def submit(self, prompt: str, **more: Any) -> str:
        body = {
            "provider": "fal",
            "model": "fal-ai/nano-banana",
            "input": {"prompt": prompt},
            **more,
        }
        headers = {"authorization": f"Bearer {self.key}"}
        answer = httpx.post(f"{self.server.url}/v1/predictions", json=body, headers=headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    @contextmanager
    def page(self, **more: Any) -> Iterator[Page]:
        """Open a page and sign in; assert at the end that the console shows no errors."""
        context = self.browser.new_context(**more)
        context.set_default_timeout(PATIENCE * 1000)
        context.add_init_script(VIOLATIONS)
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"{self.server.url}/ui/predictions")
        page.get_by_label("API key or viewer key").fill(self.key)
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url("**/ui/predictions")
        try:
            yield page
            assert [line for line in said if "Content Security" in line or "Error" in line] == []
        finally:
            context.close()

    def go(self, page: Page, path: str) -> None:
        page.goto(f"{self.server.url}/ui{path}")


@contextmanager
def desk_in(folder: Path) -> Iterator[Desk]:
    """Run a server with emulated providers, and a browser."""
    (folder / "mine.py").write_text(HANDLER)
    (folder / "recipes.toml").write_text(RECIPES)
    env = {"RECEIVER_RECIPES": "recipes.toml", "SAVE_DIR": str(folder / "results")}
    with (
        running("serve", "--emulate", "mine.py", "save", cwd=folder, **env) as server,
        sync_playwright() as playwright,
        # A container has no user namespaces for Chromium's sandbox.
        playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        server.wait_for("  Try ")
        key = api_key((folder / "receiver.db.dev-secret").read_text())
        yield Desk(server, browser, folder, key)
