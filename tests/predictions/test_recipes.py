"""The recipe file and its errors, templates, and the periods of limits."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.model.errors import Problem, SettingsError
from receiver.model.recipes import Allow, Limit, Per, RecipeBook
from receiver.model.requests import SubmitRequest
from receiver.model.values import Order
from receiver.predictions.limits import Limits, check_allowed, end_of, refusal
from receiver.predictions.recipes import fill
from receiver.settings import Settings
from receiver.store.budgets import Excess
from tests.receiving import ENV

PAGE = Path(__file__).parent.parent.parent / "deploy" / "recipes.md"
[EXAMPLE] = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
SECRET = "x" * 32


def look(tmp_path: Path, text: str) -> tuple[Settings, list[str]]:
    """Read a recipe file; return the settings, and the problems without their common prefix."""
    file = tmp_path / "recipes.toml"
    file.write_text(text)
    found, problems = Settings.parse({"RECEIVER_RECIPES": str(file), "RECEIVER_SECRET_KEY": SECRET})
    return found, [problem.removeprefix(f"RECEIVER_RECIPES: {file}") for problem in problems]


def test_example_in_the_recipes_page_is_valid(tmp_path: Path) -> None:
    settings, problems = look(tmp_path, EXAMPLE)
    assert problems == []
    imagine = settings.recipes.recipes["imagine"]
    assert (imagine.price, imagine.latest, imagine.rest) == (40_000, 600, "prompt")
    assert imagine.options["count"].most == 4
    assert imagine.buttons["Larger"].result == "image"
    assert settings.recipes.limits[1] == Limit(by="all", per="month", cost=50_000_000)
    assert settings.recipes.allow[0] == Allow(place="slack:T01/*")


def test_every_key_of_a_recipe_file_is_documented() -> None:
    source = (PAGE.parent.parent / "receiver" / "settings" / "recipes.py").read_text()
    keys = set(re.findall(r'\.(?:take|need)\("(\w+)"', source))
    table = PAGE.read_text().partition("| Table | Key |")[2].partition("\n\n")[0]
    assert len(keys) > 15
    assert [key for key in keys if f"`{key}`" not in table] == []


BAD = """
title = "x"

[imagine]
provder = "fal"
model = "../x"
input = { prompt = "{promt}", when = 2026-01-01, b = "{", c = [inf] }
price = -1
latest = 0

[imagine.options.prompt]
kind = "txt"
requird = true

[imagine.options.n]
kind = "integer"
choices = ["a"]
longest = 3
default = 1.5
rest = true

[imagine.options.size]
choices = ["xl", "XL"]

[imagine.buttons]
Again = "imagin"
X = 3

[Help]
provider = "fall"
model = "a/b"
input = {}
[Help.buttons]
Y = { recipe = "imagine", result = "n" }

[[limits]]
by = "persn"
per = "week"

[[limits]]
by = "all"
per = "day"
cots = 3

[[allow]]
people = "x"
"""
PROBLEMS = """
, [[limits]] number 1: by must be person, place, recipe, key, all or metadata.NAME (did you mean person?)
, [[limits]] number 1: per must be one of hour, day, month
, [[limits]] number 1: it needs count, cost (dollars), or both
, [[limits]] number 2: cots: there is no such key (did you mean cost?)
, [[limits]] number 2: it needs count, cost (dollars), or both
, [[allow]] number 1: people: there is no such key
: title must be a table, [title]
, [imagine.options.prompt]: kind must be one of text, integer, number, boolean, picture (did you mean text?)
, [imagine.options.prompt]: requird: there is no such key (did you mean required?)
, [imagine.options.n]: longest is for options of kind text
, [imagine.options.n]: rest is for options of kind text
, [imagine.options.n]: choices must be a whole number
, [imagine.options.n]: default must be a whole number
, [imagine.options.size]: choices must differ by more than small and capital letters
, [imagine]: provider is missing
, [imagine]: model must be a path like owner/name
, [imagine]: input has '{promt}': there is no option promt (did you mean prompt?)
, [imagine]: input holds 2026-01-01, which JSON cannot express: put it in quotes
, [imagine]: input has '{': a placeholder is an option's name in braces, and a brace itself is written {{ or }}
, [imagine]: input holds inf, which JSON cannot express: put it in quotes
, [imagine]: price must be dollars, as 0.04
, [imagine]: latest must be a number of seconds above 0
, [imagine.buttons]: X must be a recipe in quotes, or { recipe = "upscale", result = "image" } with the option that gets the picture
, [imagine]: provder: there is no such key (did you mean provider?)
, [Help]: a name is a small letter, then up to 31 of a-z, 0-9, _ and -, and not allow, help, limits
, [Help]: provider must be one of oxen, eachlabs, fal, replicate, ideogram, bfl, wavespeed, openrouter (did you mean fal?)
, [imagine]: button Again: there is no recipe imagin (did you mean imagine?)
, [Help]: button Y: imagine has no picture option n
"""  # noqa: E501 - as they are reported


def test_all_errors_of_a_recipe_file_are_reported_at_once(tmp_path: Path) -> None:
    _, problems = look(tmp_path, BAD)
    assert problems == PROBLEMS.strip("\n").splitlines()


def test_unreadable_recipe_file_is_reported_with_all_other_settings(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.read({"RECEIVER_RECIPES": str(tmp_path / "none.toml"), "RECEIVER_LOG_LEVEL": "x"})
    message = str(refused.value)
    assert "none.toml cannot be read: No such file or directory" in message
    assert "RECEIVER_LOG_LEVEL" in message
    assert "RECEIVER_SECRET_KEY" in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[a", ":1:3: not TOML: "),
        ("a = " + "[" * 5000, " is not TOML: "),
        ("\x00", ":1:1: not TOML: "),
        ("a = 'b'\n[a]\n", ":2:3: not TOML: "),
        ("b = 1\na = ", ":2:5: not TOML: "),
    ],
)
def test_invalid_toml_is_reported_with_line_and_column(
    tmp_path: Path, text: str, says: str
) -> None:
    _, [problem] = look(tmp_path, text)
    assert problem.startswith(says)


def test_recipe_file_with_bom_and_crlf_is_read_and_utf_16_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "recipes.toml"
    settings = ENV | {"RECEIVER_RECIPES": str(file)}
    file.write_text(EXAMPLE, "utf-8-sig", newline="\r\n")
    assert "imagine" in Settings.read(settings).recipes.recipes
    file.write_text(EXAMPLE, "utf-16")
    with pytest.raises(SettingsError, match="is not text in UTF-8: save it as that"):
        Settings.read(settings)


def test_too_deeply_nested_template_is_reported(tmp_path: Path) -> None:
    recipe = '[a]\nprovider = "fal"\nmodel = "a/b"\ninput'
    _, problems = look(tmp_path, recipe + ".a" * 3000 + " = 1")
    assert problems == [", [a]: input nests at most 64 deep"]


# --- templates ---


def test_template_value_that_is_one_placeholder_keeps_its_type() -> None:
    template = {
        "prompt": "{prompt}, {style} {{art}}",
        "number": "{count}",
        "list": ["{count}", "{absent}", {"hd": "{hd}", "gone": "{absent}"}],
        "fixed": 3,
    }
    values = {"prompt": "a {fox}", "count": 4, "hd": True}
    assert fill(template, values) == {
        "prompt": "a {fox},  {art}",
        "number": 4,
        "list": [4, {"hd": True}],
        "fixed": 3,
    }


# --- limits ---

TIMES = st.floats(0, 4e9)
PER: st.SearchStrategy[Per] = st.sampled_from(["hour", "day", "month"])


@given(TIMES, PER)
def test_limit_periods_cover_all_time_without_a_gap(now: float, per: Per) -> None:
    end = end_of(per, now)
    assert now < end
    assert end_of(per, end - 0.001) == end
    assert end_of(per, end) > end
    ends = datetime.fromtimestamp(end, UTC)
    assert (ends.minute, ends.second) == (0, 0)
    assert ends.hour == 0 or per == "hour"
    assert ends.day == 1 or per != "month"
    assert end - now <= {"hour": 3600, "day": 86400, "month": 31 * 86400}[per]


def subjects(limit: Limit, **about: Any) -> set[str]:
    order = Order(recipe="imagine", person=about.get("person"), place=about.get("place"), via="api")
    request = SubmitRequest(
        provider="fal", model="m", input={}, metadata=about, caller=about.get("key")
    )
    settings = Settings(recipes=RecipeBook(limits=(limit,)))
    return {bound.subject for bound in Limits(settings).terms(request, order, 1, 0.0).bounds}


@pytest.mark.parametrize("by", ["person", "place", "key", "metadata.person"])
def test_limit_counts_orders_by_person_place_key_or_metadata(by: str) -> None:
    limit = Limit(by=by, per="day", count=1)
    first = {"person": "ada", "place": "here", "key": "web"}
    other = {"person": "bob", "place": "there", "key": ""}
    counted_by = by.rpartition(".")[2]
    [subject] = subjects(limit, **first)
    assert subjects(limit, **(other | {counted_by: first[counted_by]})) == {subject}
    assert subjects(limit, **(first | {counted_by: other[counted_by]})) != {subject}
    assert subjects(limit) == set()  # an order without the field is not counted
    assert subjects(Limit(by=by, per="hour", count=1), **first) != {subject}


@pytest.mark.parametrize(
    ("place", "person", "allowed"),
    [
        (None, None, True),  # an order by an API key alone
        ("slack:T01/C01", "slack:U01", True),
        ("slack:T01/C01", None, True),
        ("slack:T02/C01", "slack:U01", False),
        ("telegram:1", "telegram:4711", True),
        ("telegram:1", "telegram:4712", False),
        (None, "telegram:4711", False),
        ("", "", False),
    ],
)
def test_order_is_allowed_only_for_listed_people_and_places(
    place: str | None, person: str | None, allowed: bool
) -> None:
    lists = [Allow(place="slack:T01/*"), Allow(place="telegram:*", person="telegram:4711")]
    order = Order(recipe="imagine", person=person, place=place, via="test")
    if allowed:
        check_allowed(lists, order)
        return
    with pytest.raises(Problem, match="you may not order here"):
        check_allowed(lists, order)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-1, "a second"),
        (1.5, "2 seconds"),
        (60, "60 seconds"),
        (61, "2 minutes"),
        (3600, "60 minutes"),
        (3601, "2 hours"),
        (86401, "2 days"),
    ],
)
def test_over_limit_error_says_when_to_try_again(seconds: float, words: str) -> None:
    limit = Limit(by="all", per="month", count=1)
    problem = refusal(limit, Excess(0, "count", 1000.0 + seconds), 1000.0)
    assert problem.detail.endswith(f"; try again in {words}")
    assert (problem.status, problem.type) == (429, "over-limit")
    assert problem.retry_after == max(1, math.ceil(seconds))
