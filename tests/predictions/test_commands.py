# ruff: noqa: RUF001 - these are the characters that phones insert
"""Commands as people type them, and with the quotes and dashes that phones insert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from receiver.model.errors import Problem
from receiver.model.recipes import Option, Recipe, RecipeBook
from receiver.predictions.commands import parse, read_words, split, words_of
from receiver.predictions.recipes import line, offered, read_options, recipe_of

IMAGINE = Recipe(
    name="imagine",
    about="A picture from words",
    provider="fal",
    model="fal-ai/flux",
    price=40_000,
    options={
        "prompt": Option(about="What to draw", required=True, rest=True, longest=60),
        "ratio": Option(choices=("1:1", "16:9"), default="1:1"),
        "steps": Option(kind="integer", least=1, most=8),
        "hd": Option(kind="boolean"),
    },
)
UPSCALE = Recipe(
    name="upscale",
    provider="fal",
    model="fal-ai/up",
    options={
        "image": Option(kind="picture", required=True),
        "factor": Option(kind="number", required=True),
    },
)
BOOK = RecipeBook(recipes={"imagine": IMAGINE, "upscale": UPSCALE})


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("imagine a lighthouse", {"prompt": "a lighthouse"}),
        ("/Imagine  a   lighthouse ", {"prompt": "a lighthouse"}),
        (
            'imagine a lighthouse --ratio 16:9 steps=4 "by night"',
            {"prompt": 'a lighthouse "by night"', "ratio": "16:9", "steps": "4"},
        ),
        ("imagine --ratio=16:9 --HD no fox", {"prompt": "fox", "ratio": "16:9", "hd": "no"}),
        ("imagine fox --hd", {"prompt": "fox", "hd": "yes"}),
        ("imagine --hd a fox", {"prompt": "a fox", "hd": "yes"}),
        ("imagine fox --no-hd", {"prompt": "fox", "hd": False}),
        # quotes and dashes that phones insert
        ("imagine “a cat’s hat” —ratio 16:9", {"prompt": "a cat’s hat", "ratio": "16:9"}),
        ("imagine fox –ratio=“16:9”", {"prompt": "fox", "ratio": "16:9"}),
        ("imagine ‘a fox’ ratio=16:9", {"prompt": "a fox", "ratio": "16:9"}),
        ("imagine „ein Fuchs“", {"prompt": "ein Fuchs"}),
        # dashes and quotes in text that are not syntax
        ("imagine a fox —she said— runs", {"prompt": "a fox —she said— runs"}),
        ("imagine don't stop at 5\" e=mc2", {"prompt": "don't stop at 5\" e=mc2"}),
        ('imagine "half a quotation', {"prompt": '"half a quotation'}),
        ('imagine a sign: "--ratio 16:9"', {"prompt": 'a sign: "--ratio 16:9"'}),
        (r'imagine "say \"hi\" now"', {"prompt": 'say "hi" now'}),
        ("imagine fox -- --ratio 16:9", {"prompt": "fox --ratio 16:9"}),
        # without an option for the rest, words fill the required options
        ("upscale https://a.test/b.png 2", {"image": "https://a.test/b.png", "factor": "2"}),
        ("upscale 2 image=https://a.test/b", {"image": "https://a.test/b", "factor": "2"}),
    ],
)
def test_command_is_parsed_into_a_recipe_and_its_options(
    text: str, options: dict[str, Any]
) -> None:
    command = parse(BOOK, text)
    assert (command.recipe, command.options, command.help) == (
        text.split(maxsplit=1)[0].strip("/").lower(),
        options,
        "",
    )


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("imagin a fox", "unknown-recipe", "did you mean imagine?"),
        ("imagine fox --ratoi 16:9", "bad-option", "did you mean ratio?"),
        ("imagine fox —ratoi 16:9", "bad-option", "did you mean ratio?"),
        ("imagine fox --ratio", "bad-option", "--ratio needs a value"),
        ("imagine fox --steps 2 steps=3", "bad-option", "steps is given twice"),
        ("imagine fox prompt=cat", "bad-option", "prompt is given twice"),
        ("upscale a 2 c", "bad-option", "'c' belongs to no option"),
        ("imagine " + "a" * 10_000, "bad-option", "at most 10000 characters"),
    ],
)
def test_invalid_command_is_rejected_with_a_message(text: str, code: str, words: str) -> None:
    with pytest.raises(Problem) as refused:
        parse(BOOK, text)
    assert refused.value.type == code
    assert words in refused.value.detail


def test_corrected_command_in_an_error_message_is_valid() -> None:
    with pytest.raises(Problem) as refused:
        read_options(IMAGINE, parse(BOOK, "imagine a fox --ratio 16:8 --steps 40").options)
    said, _, right = refused.value.detail.partition(". This would be right: ")
    assert said == ("ratio must be one of 1:1, 16:9 (did you mean 16:9?); steps must be 8 or less")
    assert right == "imagine a fox --ratio 16:9 --steps 8"
    assert read_options(IMAGINE, parse(BOOK, right).options)["steps"] == 8


@pytest.mark.parametrize(
    ("least", "most", "given", "right"),
    [(0, 1, -5, 0), (0, 1, 5, 1), (-3, 0, 2, 0), (2, None, 1, 2), (2, None, "many", 2)],
)
def test_corrected_number_is_within_its_bounds(
    least: float, most: float | None, given: object, right: float
) -> None:
    option = Option(kind="number", least=least, most=most)
    recipe = Recipe(name="blend", provider="fal", model="m", options={"strength": option})
    with pytest.raises(Problem) as refused:
        read_options(recipe, {"strength": given})
    assert refused.value.detail.endswith(f"This would be right: blend --strength {right}")


def test_only_20_words_after_a_long_dash_are_compared_with_the_options() -> None:
    """A comparison takes time, and a message could need thousands of them."""
    with pytest.raises(Problem, match=r"did you mean ratio\?"):
        parse(BOOK, "imagine" + " —x" * 19 + " —ratoi 16:9")
    text = "—x " * 20 + "—ratoi 16:9"
    assert parse(BOOK, f"imagine {text} —hd").options == {"prompt": text, "hd": "yes"}


@pytest.mark.parametrize("text", ["", "help", "/help"])
def test_help_lists_all_recipes(text: str) -> None:
    said = parse(BOOK, text).help
    assert "imagine  A picture from words" in said
    assert "help imagine" in said


@pytest.mark.parametrize("text", ["help imagine", "imagine --help", "help /imagine"])
def test_help_of_a_recipe_lists_its_options_and_cost(text: str) -> None:
    assert parse(BOOK, text).help.splitlines() == [
        "A picture from words",
        "imagine <prompt> --ratio 1:1",
        "  prompt  What to draw, at most 60 characters, required",
        "  ratio  1:1 | 16:9, 1:1 if not given",
        "  steps  a whole number, at least 1, at most 8",
        "  hd  yes or no",
        "It costs $0.04.",
    ]


def refused_or(read: Callable[[], dict[str, Any]]) -> dict[str, Any] | Problem:
    try:
        return read()
    except Problem as problem:
        return problem


@given(st.text(st.sampled_from("ab \"'“”‘’—–-=\\\n:1ratiohd "), max_size=60))
@example('imagine "')
def test_any_text_is_parsed_or_rejected(text: str) -> None:
    words = split(text)
    assert "".join("".join(word.raw for word in words).split()) == "".join(text.split())
    found = refused_or(lambda: read_options(IMAGINE, read_words(IMAGINE, words)))
    assert isinstance(found, dict) or found.type == "bad-option"


NAMES = st.sampled_from(["prompt", "ratio", "steps", "hd", "nothing"])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=70)
    | st.sampled_from(["16:9", "4", "yes", "a fox"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@given(st.dictionaries(NAMES, JSON, max_size=5))
def test_any_options_are_valid_or_rejected(options: dict[str, Any]) -> None:
    read = refused_or(lambda: read_options(IMAGINE, options))
    if isinstance(read, Problem):
        assert (read.type, read.status) == ("bad-option", 422)
        return
    assert read_options(IMAGINE, read) == read
    assert isinstance(read["prompt"], str)
    assert 0 < len(read["prompt"]) <= 60
    assert read["ratio"] in {"1:1", "16:9"}
    assert isinstance(read.get("steps", 1), int)
    assert 1 <= read.get("steps", 1) <= 8
    assert isinstance(read.get("hd", True), bool)


@pytest.mark.parametrize("title", ["", "a fox", 'say "hi" now', '"hi"', '5"', "two\nlines"])
def test_text_in_a_command_line_parses_to_the_same_text(title: str) -> None:
    post = Recipe(name="post", provider="fal", model="m", options={"title": Option()})
    made = line(post, {"title": title})
    assert parse(RecipeBook(recipes={"post": post}), made).options == {"title": title}


@given(
    st.fixed_dictionaries(
        {
            "prompt": st.from_regex(r"[a-z]+( [a-z]+)*", fullmatch=True).filter(
                lambda t: len(t) < 60
            )
        },
        optional={
            "ratio": st.sampled_from(["1:1", "16:9"]),
            "steps": st.integers(1, 8),
            "hd": st.booleans(),
        },
    )
)
def test_command_line_made_from_options_parses_to_the_same_options(options: dict[str, Any]) -> None:
    expected = read_options(IMAGINE, options)
    for recipe in (IMAGINE, recipe_of(offered(IMAGINE))):  # as the command line has it
        words = line(recipe, options).split(" ")[1:]
        assert read_options(recipe, read_words(recipe, words_of(words))) == expected
