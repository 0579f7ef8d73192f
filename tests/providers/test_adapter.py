"""The parsers that all adapters share, each with a table of inputs and results."""

from __future__ import annotations

import base64
import re
import time
from typing import Any

import httpx
import pytest

from receiver.model.errors import Problem, Unreadable
from receiver.model.values import Error, Outcome, Output
from receiver.providers import parsing, results
from receiver.providers.adapter import Postponed, ProviderResponse, Refused

NOW = 1767225600.0


def answer(status: int = 200, **headers: str) -> ProviderResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return ProviderResponse(status, httpx.Headers(named), b"", NOW)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7.0),
        (" 7 ", 7.0),
        ("1_0", None),
        ("0", 0.0),
        ("1.5", 1.5),
        ("-5", 0.0),
        ("3600", 3600.0),
        ("7200", 7200.0),
        ("1e300", 365 * 86400.0),
        ("inf", None),
        ("-inf", None),
        ("nan", None),
        ("", None),
        ("   ", None),
        ("soon", None),
        ("Thu, 01 Jan 2026 00:00:42 GMT", 42.0),
        ("Thu, 01 Jan 2026 00:00:42 +0000", 42.0),
        ("Thu, 01 Jan 2026 02:00:42 +0200", 42.0),
        ("Thursday, 01-Jan-26 00:00:42 GMT", 42.0),
        ("Thu Jan  1 00:00:42 2026", 42.0),
        ("Wed, 31 Dec 2025 23:59:59 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 365 * 86400.0),
        ("Thu, 99 Jan 2026 00:00:42 GMT", None),
        ("Mon, 01 Jan 10000 00:00:00 GMT", None),
        ("Thu, 01 Jan 2026 00:00:42 +9999999999", None),
    ],
)
def test_retry_after_header_is_read_as_seconds_from_now(text: str, seconds: float | None) -> None:
    assert parsing.retry_after(answer(retry_after=text)) == seconds


def test_retry_after_date_without_a_zone_is_utc_in_any_local_zone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as here:
        here.setenv("TZ", "XXX-5")
        time.tzset()
        assert parsing.retry_after(answer(retry_after="Thu Jan  1 00:00:42 2026")) == 42.0
    time.tzset()


def test_missing_retry_after_is_none() -> None:
    assert parsing.retry_after(answer()) is None


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        (b'{"retry_after": 7}', 7.0),
        (b'{"retry_after": 0.5, "detail": "resets in ~30s."}', 0.5),
        (b'{"retry_after": "7", "detail": "Your rate limit resets in ~30s."}', 7.0),
        (b'{"retry_after": "soon", "detail": "Your rate limit resets in ~30s."}', 30.0),
        (b'{"detail": "Request was throttled. Expected available in 1 second."}', 1.0),
        (b'{"detail": "Expected available in 12 seconds."}', 12.0),
        (b'{"error": {"message": "try again after 2.5 sec"}}', 2.5),
        (b'{"retry_after": true, "detail": "in 5 steps, in 7 stages"}', None),
        (b'{"retry_after": NaN}', None),
        ('{"retry_after": "\u0667", "detail": "in \u0667 s"}'.encode(), None),
        (b"throttled", None),
    ],
)
def test_wait_in_a_429_body_is_used_without_a_retry_after_header(
    body: bytes, seconds: float | None
) -> None:
    refused = ProviderResponse(429, httpx.Headers(), body, NOW)
    assert parsing.retry_after(refused) == seconds
    headers = httpx.Headers({"retry-after": "3"})
    assert parsing.retry_after(ProviderResponse(429, headers, body, NOW)) == 3.0
    assert parsing.retry_after(ProviderResponse(200, httpx.Headers(), body, NOW)) is None


@pytest.mark.parametrize(
    ("url", "ours"),
    [
        ("https://api.acme.ai/v1/x", True),
        ("https://api.eu2.acme.ai/v1/x?id=1", True),
        ("https://acme.ai/", True),
        ("http://127.0.0.1:8001/acme/x", True),
        ("http://api.acme.ai/v1/x", False),
        ("https://api.acme.ai:8443/v1/x", False),
        ("https://evil@api.acme.ai/", False),
        ("https://evil.ai/api.acme.ai", False),
        ("https://notacme.ai/", False),
        ("https://acme.ai.evil.com/", False),
        ("https://api.acme.ai\\@evil.com/", False),
        ("//api.acme.ai/", False),
        ("https://[", False),
        ("https://ünicode.acme.ai.evil/", False),
        (7, False),
        (None, False),
    ],
)
def test_api_key_is_sent_only_to_the_base_urls_and_the_providers_domain(
    url: Any, *, ours: bool
) -> None:
    bases = ["https://api.acme.ai", "http://127.0.0.1:8001/acme"]
    assert parsing.may_receive_key(url, bases, "acme.ai") == ours


@pytest.mark.parametrize("status", [200, 201, 202, 204, 226, 299])
def test_any_2xx_is_left_to_the_adapter(status: int) -> None:
    assert parsing.settle_submit(answer(status), "", blocks=True) is None


@pytest.mark.parametrize(
    "status", [300, 301, 307, 400, 401, 402, 403, 404, 409, 410, 422, 451, 499]
)
def test_3xx_or_4xx_rejects_a_submit_for_good(status: int) -> None:
    silently = f"HTTP {status} without a reason"
    for blocks in (False, True):
        refused = answer(status, retry_after="5")
        assert parsing.settle_submit(refused, "no", blocks=blocks) == Refused("no")
        assert parsing.settle_submit(refused, "", blocks=blocks) == Refused(silently)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 501, 502, 503, 520, 599])
def test_temporary_error_postpones_a_submit_and_5xx_fails_a_blocking_one(status: int) -> None:
    expected = Postponed("later", 5.0, whole_provider=status == 429)
    later = answer(status, retry_after="5")
    assert parsing.settle_submit(later, "later", blocks=False) == expected
    settled = parsing.settle_submit(later, "later", blocks=True)
    assert settled == (expected if status < 500 else FAILED)


FAILED = Outcome(kind="failed", error=Error(code="provider_error", message="later"))


@pytest.mark.parametrize(
    ("candidates", "said"),
    [
        (("a", "b"), "a"),
        (("", "  ", "b"), "b"),
        ((None, 7, ["a"], {"a": 1}, True, "b"), "b"),
        ((), ""),
        (("\n",), ""),
        (("a\x00b\x1bc\x7fd\re",), "a b c d e"),
        (("a\tb\nc",), "a\tb\nc"),
        ((" a ",), "a"),
        (("é٣🌊",), "é٣🌊"),
        (("x" * 5000,), "x" * 2000),
    ],
)
def test_first_text_is_the_first_candidate_that_is_not_blank(
    candidates: tuple[Any, ...], said: str
) -> None:
    assert parsing.first_text(*candidates) == said


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        (("a", "b"), "a"),
        (("", None, 1.5, True, "b"), "b"),
        ((7, "b"), "7"),
        (("x" * 200,), "x" * 200),
        (("x" * 201, "b"), "b"),
        (("a b", "a\nb", "a\x00b", "\ud800", "b"), "b"),
        ((".", "..", "a/b", "../b", "/", "b"), "b"),
        (("...",), "..."),
        (("a:b_c-d.e",), "a:b_c-d.e"),
        ((), None),
    ],
)
def test_identifier_is_one_printable_path_segment(
    candidates: tuple[Any, ...], chosen: str | None
) -> None:
    assert parsing.identifier(*candidates) == chosen


def test_failure_with_very_long_texts_is_bounded() -> None:
    # Without a bound, the search for a code takes time quadratic in the length of this text.
    error = parsing.failure("y" * 5000, *["violata " * 1000] * 1000)
    assert error.message == "y" * 2000


def test_joined_sentences_are_bounded_without_empty_ones() -> None:
    assert parsing.join(["a", "", "b"]) == "a; b"
    assert len(parsing.join(["a" * 1500, "b" * 1500])) == 2000


FILE = "https://files.example/1.png"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (FILE, [Output(url=FILE)]),
        ("http://files.example/", [Output(url="http://files.example/")]),
        ("data:image/png;base64,AA", [Output(url="data:image/png;base64,AA")]),
        ("some words", [Output(text="some words")]),
        (["some", FILE], [Output(text="some"), Output(url=FILE)]),
        ([[["some"]]], [Output(text="some")]),
        ({"text": "some words"}, []),
        ({"images": [{"caption": "words"}]}, []),
        ({"a": {"b": [FILE]}}, [Output(url=FILE)]),
        ({"url": FILE, "thumbnail": {"url": "https://t.example/"}}, [Output(url=FILE)]),
        ({"url": None, "image": {"url": FILE}}, [Output(url=FILE)]),
        ({"url": FILE, "width": -1, "duration": 2}, [Output(url=FILE, width=-1, duration=2.0)]),
        ({"url": FILE, "width": 2**53, "duration": 1e300}, [Output(url=FILE)]),
        ({"url": FILE, "width": 2**53 - 1}, [Output(url=FILE, width=2**53 - 1)]),
        ({"url": FILE, "duration": True, "width": False}, [Output(url=FILE)]),
        (
            {"url": FILE, "images": [{"url": FILE + "?2"}]},
            [Output(url=FILE), Output(url=FILE + "?2")],
        ),
        ({"url": "", "images": [FILE]}, [Output(url=FILE)]),
        ({"video_url": FILE}, [Output(url=FILE)]),
        ({"video": FILE, "image_url": "https://i.example/in.png"}, [Output(url=FILE)]),
        ({"images": [FILE], "start_image": {"url": "https://i.example/"}}, [Output(url=FILE)]),
        ({"prompt": FILE, "negative_prompt": FILE, "loras": [FILE], "logs": [FILE]}, []),
        (
            {"model": {"url": "https://x/m"}, "user": {"image": "https://x/u"}, "image": FILE},
            [Output(url=FILE)],
        ),
        ({"model": {"url": FILE}, "options": {"seed": 1}}, [Output(url=FILE)]),
        (
            {"model": {"url": "https://x/m.glb", "file_size": 9}, "rendered_image": FILE},
            [Output(url="https://x/m.glb", file_size=9), Output(url=FILE)],
        ),
        ('{"images": ["https://files.example/1.png"]}', [Output(url=FILE)]),
        ('{"a": "b"}', [Output(text='{"a": "b"}')]),
        (f" {FILE}\n", [Output(url=FILE)]),
        ({"images": ["https://a b/", "https://a/\0", "https:///x", "http://[", "ftp://a/"]}, []),
        ({"images": ["data: a chart, of sales", "data:text/plain", "data:;base64,"]}, []),
        ("data:image/png;base64,AA\nAA", [Output(url="data:image/png;base64,AAAA")]),
        ("a\0b", [Output(text="ab")]),
        ("", []),
        ("  ", []),
        (None, []),
        (7, []),
        (True, []),
        ([], []),
        ({}, []),
    ],
)
def test_outputs_are_found_in_every_shape(value: Any, expected: list[Output]) -> None:
    assert results.outputs(value) == expected


def test_outputs_are_bounded_in_number_and_depth() -> None:
    assert len(results.outputs([f"{FILE}?{number}" for number in range(5000)])) == 1000
    assert results.outputs([FILE, {"url": FILE, "width": 1}, FILE]) == [Output(url=FILE, width=1)]
    nested: Any = FILE
    for _ in range(12):
        nested = [nested]
    assert results.outputs(nested) == [Output(url=FILE)]
    assert results.outputs([nested]) == []


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"RIFF\x00\x00\x00\x00WEBP", "image/webp"),
        (b"????", None),
    ],
)
def test_base64_becomes_a_data_uri_of_the_detected_type(head: bytes, kind: str | None) -> None:
    text = base64.b64encode(head + bytes(20)).decode()
    said = results.data_uri(text)
    assert said is not None
    assert said.url == f"data:{kind or 'application/octet-stream'};base64,{text}"
    assert said.content_type == kind


@pytest.mark.parametrize(
    ("model", "path"),
    [
        ("fal-ai/flux/dev", "fal-ai/flux/dev"),
        ("nano-banana", "nano-banana"),
        ("owner/name@v1:latest+x~y", "owner/name@v1:latest+x~y"),
        ("a b/c?d#e", "a%20b/c%3Fd%23e"),
        ("a/%2e%2e/b", "a/%252e%252e/b"),
        ("a\\..\\b", "a%5C..%5Cb"),
        ("é", "%C3%A9"),
        (".../x", ".../x"),
    ],
)
def test_model_name_is_quoted_in_the_url_path(model: str, path: str) -> None:
    assert parsing.model_path(model) == path
    sent = httpx.Request("GET", f"https://api.example/models/{path}").url.raw_path
    assert sent == f"/models/{path}".encode()


@pytest.mark.parametrize("model", ["", "/", "a/", "/a", "a//b", ".", "..", "a/../b", "../a", "a/."])
def test_model_name_with_an_empty_or_dot_segment_is_rejected(model: str) -> None:
    with pytest.raises(Problem, match="owner/name") as refusal:
        parsing.model_path(model)
    assert (refusal.value.status, refusal.value.type) == (422, "invalid-model")


@pytest.mark.parametrize("items", [None, [], {}, "x", ["x", {}], 7])
def test_first_of_anything_but_a_list_of_objects_is_empty(items: Any) -> None:
    assert parsing.first(items) == {}
    assert parsing.first([{"a": 1}, {"b": 2}]) == {"a": 1}


@pytest.mark.parametrize(
    ("key", "found"), [("a", 1), (" A ", 1), ("b", 0), ("", 0), (None, 0), (7, 0), ([], 0)]
)
def test_lookup_accepts_a_key_of_any_type(key: Any, found: int) -> None:
    assert parsing.lookup({"a": 1}, key, 0) == found


@pytest.mark.parametrize(
    ("value", "error"),
    [
        *zip((None, False, 0, "", " ", [], {}, "null", "None", [""]), [False] * 10, strict=True),
        *zip((True, "boom", {"message": "boom"}, ["boom"], 500), [True] * 5, strict=True),
    ],
)
def test_error_field_is_an_error_only_if_it_is_not_empty(value: Any, error: bool) -> None:
    assert parsing.is_error(value) == error


def test_invalid_json_error_does_not_quote_the_body() -> None:
    with pytest.raises(Unreadable) as refusal:
        parsing.decode(b'{"secret-looking": ')
    assert re.fullmatch(r"not JSON: \w+", str(refusal.value))
