"""The dashboard in a real browser; skipped without Chromium, which `.ci/run` installs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from playwright.sync_api import Page, expect

from tests.dashboard.desk import CHROMIUM, Desk, desk_in

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed here")

EVIL: Final = "<img src=x onerror=\"document.title='broken in'\">"
AXE: Final = (Path(__file__).parent / "axe.min.js").read_text()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    with desk_in(tmp_path_factory.mktemp("desk")) as desk:
        yield desk


def unbroken(page: Page) -> None:
    """Assert that nothing violated the content security policy, and no text became markup."""
    assert page.evaluate("window.violations ?? []") == []
    assert page.locator("img[src='x']").count() == 0
    assert "broken in" not in page.title()


def test_status_updates_live_and_a_dead_letter_can_be_retried(desk: Desk) -> None:
    with desk.page() as page:
        desk.go(page, "/predictions")
        name = desk.submit(f"live {EVIL} [dead]", metadata={EVIL: EVIL})
        row = page.locator("tr", has=page.locator(f"a[href$='{name}']"))
        expect(row.locator(".badge")).to_have_text("succeeded")  # without a reload
        row.locator("a").first.click()
        card = page.locator("li.card", has=page.get_by_role("heading", name="mine"))
        expect(card.locator("h3 .badge")).to_have_text("dead")
        unbroken(page)
        desk.go(page, "/deliveries")
        letter = page.locator("tr", has=page.locator(f"a[href$='{name}']"))
        (desk.folder / "well").touch()
        letter.get_by_role("button", name="Retry").click()
        expect(page.get_by_role("status")).to_have_text("Done: retry.")
        expect(page.locator(f"a[href$='{name}']")).to_have_count(0)
        unbroken(page)
        desk.go(page, f"/predictions/{name}")
        expect(card.locator("h3 .badge")).to_have_text("done")


def test_filters_and_pictures_can_be_used_by_keyboard(desk: Desk) -> None:
    names = [desk.submit(f"a picture of {what}") for what in ("a boat", "a car", "a bus")]
    with desk.page() as page:
        for name in names:
            desk.go(page, f"/predictions/{name}")
            expect(page.locator("h1 .badge")).to_have_text("succeeded")
        desk.go(page, "/predictions")
        page.keyboard.press("/")
        page.keyboard.type("a picture of")
        page.keyboard.press("Enter")
        page.wait_for_url(re.compile("text=a\\+picture"))
        expect(page.locator("[data-item]")).to_have_count(3)
        page.get_by_label("Status").select_option("failed")
        page.get_by_role("button", name="Filter").click()
        expect(page.locator(".empty")).to_be_visible()
        page.get_by_role("link", name="Remove the filter status: failed").click()
        expect(page.locator("[data-item]")).to_have_count(3)
        page.keyboard.press("j")
        page.keyboard.press("j")
        page.keyboard.press("k")
        expect(page.locator("[data-item]").first).to_be_focused()
        page.get_by_role("link", name="Pictures").click()
        tiles = page.locator(".tile")
        expect(tiles).to_have_count(3)
        loaded = (
            "() => [...document.querySelectorAll('.tile img')].every((i) => i.naturalWidth > 0)"
        )
        page.wait_for_function(loaded)
        page.keyboard.press("j")
        page.keyboard.press("ArrowRight")
        expect(tiles.nth(1)).to_be_focused()
        page.keyboard.press("Enter")
        picture = page.locator("#lightbox img")
        expect(picture).to_have_attribute("src", re.compile(names[1]))
        page.keyboard.press("ArrowRight")
        expect(picture).to_have_attribute("src", re.compile(names[0]))
        page.keyboard.press("Escape")
        expect(tiles.nth(2)).to_be_focused()
        page.keyboard.press("?")
        expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
        unbroken(page)


PAGES: Final = (
    "",
    "/predictions",
    "/predictions?view=grid&text=nothing&status=failed",
    "/predictions?view=grid",
    "/deliveries",
    "/handlers",
    "/replays",
    "/discarded",
    "/recipes",
    "/recipes/imagine",
    "/costs",
    "/audit",
    "/nothing",
)


@pytest.mark.parametrize(
    ("scheme", "width", "rules"),
    [("light", 1200, "{}"), ("dark", 400, "{runOnly: ['color-contrast']}")],
)
def test_pages_pass_axe_accessibility_rules_and_fit_the_width(
    desk: Desk, scheme: Any, width: int, rules: str
) -> None:
    name = desk.submit(f"wide {'x' * 300} {EVIL}", metadata={"long" * 40: EVIL * 9})
    size: Any = {"width": width, "height": 800}
    with desk.page(color_scheme=scheme, viewport=size, reduced_motion="reduce") as page:
        desk.go(page, f"/predictions/{name}")
        expect(page.locator("h1 .badge")).to_have_text("succeeded")
        for path in (*PAGES, f"/predictions/{name}"):
            desk.go(page, path)
            assert page.evaluate("document.documentElement.scrollWidth") <= width, path
            page.evaluate(AXE)
            found = page.evaluate(f"axe.run(document, {rules}).then((found) => found.violations)")
            told = [(each["id"], each["nodes"][0]["html"]) for each in found]
            assert told == [], path
            unbroken(page)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, re.findall(r"\d+", ground)[:3]))
        assert (light > 600) == (scheme == "light")


def test_pages_work_without_javascript(desk: Desk) -> None:
    with desk.page(java_script_enabled=False) as page:
        desk.go(page, "/recipes/imagine")
        page.get_by_label("prompt").fill("a picture without script")
        page.get_by_role("button", name="Order").click()
        page.wait_for_url(re.compile("/ui/predictions/pred_"))
        expect(page.locator("h1")).to_contain_text("a picture without script")
        page.get_by_role("link", name="Predictions").first.click()
        page.get_by_label("Text of the input").fill("without script")
        page.get_by_role("button", name="Filter").click()
        expect(page.locator("[data-item]")).to_have_count(1)
        page.locator("summary", has_text="More").click()
        expect(page.get_by_label("Model")).to_be_visible()
        desk.go(page, "/handlers")
        page.get_by_role("button", name="Pause").first.click()
        expect(page.get_by_role("status")).to_have_text("Done: pause.")
        page.get_by_role("button", name="Resume").first.click()
        page.get_by_role("button", name="Sign out").click()
        page.wait_for_url("**/ui/sign-in")
