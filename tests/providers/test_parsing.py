"""The tolerant JSON reader: any bytes give values that strict JSON can have, or Unreadable."""

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
def test_any_bytes_give_a_storable_value_or_unreadable(body: bytes) -> None:
    with suppress(Unreadable):
        value = read_json(body)
        again = json.loads(msgspec.json.encode(value), parse_constant=pytest.fail)
        assert read_json(msgspec.json.encode(value)) == value == again


READ: Any = {"a": [*[None] * 8, True], "b": 1}


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
        (b'{"a": [-nan, nan(ind), +Inf, None, undefined, 007, .5, 0x1F, True], "b": 1}', READ),
        (
            b'{"a": "C:\\path \\x41 \\u12 \\u00e9 \\\\ \\" \\\\"}',
            {"a": 'C:\\path \\x41 \\u12 \xe9 \\ " \\'},
        ),
        (
            b'\x1e\xc2\xa0{"a": [1, 2 , ], "b": {"c": "},]",},}; <!-- 3 ms -->\x1a',
            {"a": [1, 2], "b": {"c": "},]"}},
        ),
    ],
)
def test_malformed_json_is_read_as_the_intended_value(body: bytes, value: Any) -> None:
    assert read_json(body) == value


@pytest.mark.parametrize("inner", [b"1", b"NaN", b"nan"])
@pytest.mark.parametrize("more", [1, 400, 100_000])
def test_value_nested_too_deep_is_null_and_its_siblings_are_kept(inner: bytes, more: int) -> None:
    deep = b"[" * (DEEPEST - 2) + inner + b"]" * (DEEPEST - 2)
    assert "null" not in json.dumps(read_json(deep.replace(inner, b"1")))
    body = b'{"a": [[%b%b, {"x": 1}%b], 2], "b": "c"}' % (b"[" * more, deep, b"]" * more)
    value = read_json(body)
    assert (value["a"][1], value["b"]) == (2, "c")
    assert msgspec.json.encode(value).count(b"[") == DEEPEST - 1


@pytest.mark.parametrize(
    "body",
    [
        b"soon",
        b"[error] full",
        b"{not json}",
        b'{"a": "b"',
        b'{"a": "b',
        b'{"a": 1}{"a": 2}',
        b"{'a': 1}",
        b'{"a": "' + rb"\"" * 100_000,
    ],
)
def test_truncated_or_invalid_json_is_unreadable(body: bytes) -> None:
    with pytest.raises(Unreadable):
        read_json(body)


def test_json_with_too_many_values_is_rejected_in_little_memory() -> None:
    body = b"[" + b"[]," * 2_000_000 + b"1]"
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match="more than 1000000 values"):
            read_json(body)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
