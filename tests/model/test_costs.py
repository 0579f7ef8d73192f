"""Prices: the expected cost of an input, the measured cost of outputs, and the price file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.model.costs import DEAREST, Account, PriceList, Rate, micro
from receiver.model.values import Output
from receiver.settings import Settings

PAGE: Final = (Path(__file__).parent.parent.parent / "deploy" / "costs.md").read_text()
[EXAMPLE] = re.findall(r"^```toml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
[LIMITS] = re.findall(r"^```\n(\[.*?\])\n```", PAGE, re.DOTALL | re.MULTILINE)
SECRET: Final = "x" * 32
CENT: Final = 10_000
PRICES: Final = PriceList(
    (
        Rate(pattern="fal/picture", call=CENT, image=4 * CENT),
        Rate(pattern="fal/*video*", second=10 * CENT, least=30 * CENT),
        Rate(pattern="*/large*", megapixel=2 * CENT),
        Rate(pattern="fal/picture", image=99 * CENT),  # never used: the first pattern matches
    )
)


def look(tmp_path: Path, text: str) -> tuple[PriceList, list[str]]:
    file = tmp_path / "prices.toml"
    file.write_text(text)
    given = {"RECEIVER_PRICES": str(file), "RECEIVER_SECRET_KEY": SECRET, "RECEIVER_LIMITS": LIMITS}
    found, problems = Settings.parse(given)
    assert len(found.limits) == 3
    return found.prices, [each.removeprefix(f"RECEIVER_PRICES: {file}, ") for each in problems]


def test_examples_in_costs_md_are_correct(tmp_path: Path) -> None:
    prices, problems = look(tmp_path, EXAMPLE)
    assert problems == []
    assert prices.expected("fal", "fal-ai/nano-banana", {"num_images": 2}) == 78_000
    assert prices.expected("fal", "fal-ai/veo3/fast", {"duration": "8s"}) == 3_200_000
    assert prices.expected("eachlabs", "any", {}) == 3 * CENT
    assert prices.expected("oxen", "any", {}) is None


BAD: Final = """
["fal"]
image = 1

["fall/*"]
second = -1

["oxen/*"]
least = 0.1

["*"]
call = "dear"
images = 2
"""
TOLD: Final = """
[fal]: a pattern is of provider and model, as fal/fal-ai/*
[fall/*]: there is no provider fall (did you mean fal?)
[fall/*]: second must be dollars, as 0.04
[oxen/*]: it needs one of call, image, second, megapixel, in dollars
[*]: call must be a number
[*]: images: there is no such key (did you mean image?)
"""


def test_all_errors_in_the_price_file_are_reported_together(tmp_path: Path) -> None:
    assert look(tmp_path, BAD)[1] == TOLD.strip("\n").splitlines()


@pytest.mark.parametrize(
    ("model", "input", "cents"),
    [
        ("picture", {}, 5),
        ("picture", {"num_images": 3}, 13),
        ("picture", {"num_images": "3", "n": 2}, 13),  # the largest number counts
        ("picture", {"num_images": -3, "n": True, "batch_size": [9]}, 5),
        ("picture", {"num_images": 0.5}, 5),
        ("video", {}, None),
        ("video", {"duration": 2}, 30),
        ("video", {"duration": "5s"}, 50),
        ("video", {"seconds": 5, "num_videos": 2}, 100),
        ("video", {"duration": float("nan")}, None),
        ("large", {}, 2),
        ("large", {"image_size": {"width": 2000, "height": 1000}}, 4),
        ("large", {"size": "2000x1000", "num_images": 2}, 8),
        ("large", {"width": 1000, "height": 1500}, 3),
        ("large", {"image_size": "square_hd"}, 2),
        ("unknown", {}, None),
    ],
)
def test_expected_cost_depends_on_the_input(
    model: str, input: dict[str, Any], cents: int | None
) -> None:
    assert PRICES.expected("fal", model, input) == (None if cents is None else cents * CENT)


def test_measured_cost_depends_on_the_outputs() -> None:
    picture = Output(url="https://a/b", width=1000, height=3000, duration=4.5)
    bare = Output(url="https://a/c")
    words = Output(text="no")
    assert PRICES.measured("fal", "picture", [bare, picture, words]) == 9 * CENT
    assert PRICES.measured("fal", "video", [picture]) == 45 * CENT
    assert PRICES.measured("fal", "video", [picture, bare]) is None
    assert PRICES.measured("fal", "large", [picture]) == 6 * CENT
    assert PRICES.measured("fal", "large", [bare]) is None
    assert PRICES.measured("fal", "picture", [words]) is None
    assert PRICES.measured("fal", "unknown", [picture]) is None


VALUES: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=5,
)
NAMES: Final = ["num_images", "n", "duration", "image_size", "size", "width", "height"]
AMOUNTS: Final = st.integers(0, DEAREST)


@given(
    st.builds(Rate, pattern=st.just("*"), call=AMOUNTS, image=AMOUNTS, second=AMOUNTS),
    st.dictionaries(st.sampled_from(NAMES), VALUES),
    st.lists(
        st.builds(
            Output,
            url=st.just("https://a/b"),
            width=st.none() | st.integers(-(2**53), 2**53),
            duration=st.none() | st.floats(-(2.0**53), 2.0**53),
        )
    ),
)
def test_any_cost_is_a_whole_number_within_limits_or_none(
    rate: Rate, input: dict[str, Any], made: list[Output]
) -> None:
    """Sums fit into 64-bit integers and are never negative."""
    prices = PriceList((rate,))
    for found in (prices.expected("fal", "m", input), prices.measured("fal", "m", made)):
        assert found is None or (type(found) is int and 0 <= found <= DEAREST)


@given(VALUES)
def test_untrusted_dollars_are_a_valid_amount_or_none(value: Any) -> None:
    found = micro(value)
    assert found is None or 0 <= found <= DEAREST


@pytest.mark.parametrize(
    ("dollars", "amount"),
    [(0.039, 39_000), ("0.0391", 39_100), (1, 1_000_000), (0, 0), ("", None), (True, None)],
)
def test_dollars_are_read_as_whole_microdollars(dollars: Any, amount: int | None) -> None:
    assert micro(dollars) == amount


def test_equal_accounts_have_the_same_text() -> None:
    one = Account(key="web", metadata={"b": "1", "a": "2"})
    other = Account(metadata={"a": "2", "b": "1"}, key="web")
    assert one.text() == other.text()
    assert Account.read(one.text()) == one
    assert Account().text() is None
