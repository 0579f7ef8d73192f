"""The one reader of what providers say: any bytes give strict JSON's values, or Unreadable."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.model.errors import TooLarge, Unreadable
from receiver.model.tolerant import DEEPEST, read_json
from tests.providers.strategies import values

STRICT = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, width=32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
).filter(lambda value: "Infinity" not in json.dumps(value))


@given(STRICT)
def test_strict_json_is_read_as_it_is(value: Any) -> None:
    assert read_json(json.dumps(value).encode()) == value
    assert read_json("\ufeff" + json.dumps(value)) == value
    assert read_json(json.dumps(value).encode("utf-16")) == value


@given(
    st.binary(max_size=80)
    | values.map(lambda value: json.dumps(value).encode())
    | st.text(st.characters(), max_size=40).map(lambda t: b'"' + t.encode(errors="replace") + b'"')
)
def test_any_bytes_give_what_can_be_stored_or_unreadable(body: bytes) -> None:
    with suppress(Unreadable):
        value = read_json(body)
        again = json.loads(msgspec.json.encode(value), parse_constant=pytest.fail)
        assert read_json(msgspec.json.encode(value)) == value == again


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b"[NaN, -Infinity, 1e400, -1e400]", [None] * 4),
        (b"[123456789012345678901234567890]", [123456789012345678901234567890]),
        (b"[1" + b"0" * 5000 + b"]", [None]),
        (b'["caf\xe9"]', ["caf\xe9"]),
        ('["\xe9", NaN, "'.encode() + b'\xe9"]', ["\xe9", None, "\xe9"]),
        (b'["a\nb\x01"]', ["a\nb\x01"]),
        (b'["\\ud800", "\\ud83c\\udf0a"]', ["\ufffd", "\U0001f30a"]),
        (b'{"\\ud800": 1}', {"\ufffd": 1}),
        (b'{"a": NaN, "a": 2}', {"a": 2}),
        (b'\0 {"a": 1}\0\r\n\0', {"a": 1}),
    ],
)
def test_an_oddity_is_read_as_what_it_stands_for(body: bytes, value: Any) -> None:
    assert read_json(body) == value


@pytest.mark.parametrize("odd", [b"1", b"NaN"])
def test_depth_is_bounded(odd: bytes) -> None:
    assert read_json(b"[" * DEEPEST + odd + b"]" * DEEPEST)
    with pytest.raises(Unreadable, match="deep"):
        read_json(b"[" * (DEEPEST + 1) + odd + b"]" * (DEEPEST + 1))


def test_many_small_values_are_refused_before_they_fill_the_memory() -> None:
    body = b"[" + b"[]," * 2_000_000 + b"1]"
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match="more than 1000000 values"):
            read_json(body)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
