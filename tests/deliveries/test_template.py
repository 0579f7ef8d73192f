"""Templates: valid fields are filled from every event, and invalid templates are rejected."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver import Output, Stored, Template
from receiver.testing import make_event

STORED = Stored(url="https://art.example/a.png", sha256="0" * 64, size=1, content_type="image/png")
ELSEWHERE = Stored(url="s3://b/a.png", sha256="0" * 64, size=1, content_type="image/png")


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("{model}: {prompt:.5}", "fal-ai/nano-banana: a lig"),
        ("{metadata[order]} {metadata[none]}!", "7 !"),
        ("{metadata[many]} {input[prompt]}", '["ü"] a lighthouse'),
        ("{type} {provider} {date:%Y} {seconds}", "succeeded fal 2026 9.0"),
        ("{code}{error}{text}", ""),
        ("{{{id:.5}}}", "{pred_}"),
        ("{model:d} {seconds:.0f}", "fal-ai/nano-banana 9"),
        ("{url}", "https://cdn.example/a.png"),
    ],
)
def test_template_fields_are_filled_from_the_event(text: str, filled: str) -> None:
    event = make_event(metadata={"order": 7, "many": ["ü"]})
    assert Template(text).fill(event) == filled


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "is not a field") for text in ("{nothing}", "{}", "{0}", "{metadata}", "{a b}")),
        *((text, "is not a field") for text in ("{model.real}", "{id.__class__}", "{model[0]}")),
        *((text, "is not a field") for text in ("{__class__}", "{metadata[a].b}", "{input[a][b]}")),
        *((text, "is not a template") for text in ("{id", "}", "{id!}")),
        ("{id!x}", "not a conversion"),
        *((text, "no fields of its own") for text in ("{id:{prompt.__class__}}", "{id:{}}")),
        ("{prompt:>{input[width]}}", "no fields of its own"),
        *((text, "not a format for") for text in ("{id:q}", "{prompt:.80q}", "{id:>1000000000}")),
    ],
)
def test_invalid_template_is_rejected_with_the_reason(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Template(text)


def test_template_of_a_failed_event_has_error_code_and_message() -> None:
    event = make_event("failed", error=("timeout", "too slow"))
    assert Template("{code}: {error} {url}").fill(event) == "timeout: too slow "


@pytest.mark.parametrize(
    ("output", "url"),
    [
        (Output(url="https://x.example/a", stored=STORED), STORED.url),
        (Output(url="https://x.example/a", stored=ELSEWHERE), "https://x.example/a"),
        (Output(url="data:image/png;base64,AA=="), ""),
        (Output(text="words"), ""),
    ],
)
def test_url_field_is_the_stored_copy_if_a_browser_can_open_it(output: Output, url: str) -> None:
    assert Template("{url}").fill(make_event(output=[output])) == url


def test_values_are_escaped_but_the_template_text_is_not() -> None:
    event = make_event(metadata={"a": "<b>"})
    cleaned = Template("<i>{metadata[a]}{size}</i>", more=["size"]).fill(
        event, lambda text: text.replace("<", "&lt;"), {"size": 3}
    )
    assert cleaned == "<i>&lt;b>3</i>"


json: Any = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@given(json, st.sampled_from(["", ":.3", ":>9", ":d", ":%Y", ":,.2f"]))
def test_any_json_value_can_be_filled_with_any_format(value: Any, how: str) -> None:
    event = make_event(metadata={"a": value}, input={"prompt": value})
    assert isinstance(Template(f"{{metadata[a]{how}}}{{prompt{how}}}").fill(event), str)
