"""Hypothesis strategies for arbitrary data that providers, or attackers, may send."""

from __future__ import annotations

import json
import math
from typing import Any, Final

import httpx
from hypothesis import strategies as st

from receiver.model.values import Mode, Ticket
from receiver.providers.adapter import ProviderResponse

_KEYS: Final = """
status error error_type error_message message details detail output outputs payload
payload_error request_id gateway_request_id exec_id predictionID id flow_id workflow_id
generations generation_id model model_name prompt enqueued_at url result_url images b64_json
status_url response_url cancel_url loc msg type title classification category error_code
content_type file_name file_size width height duration keys x
data failure_reason is_image_safe usage_cost_usd_micros outputs urls get code has_nsfw_contents
secret unsigned_urls usage cost
""".split()  # noqa: SIM905 - words, not punctuation
_TEXTS: Final = """
OK ERROR COMPLETED IN_QUEUE succeeded success failed error cancelled processing created
req-1 .. . a/b https://files.example/1.png data:, client_cancelled timeout
https://queue.fal.run/s https://u@queue.fal.run/s https://queue.fal.run\x00/ https://[
completed pending timeout expired cancelled https://api.wavespeed.ai/x 39000
media_generation_completed iVBORw0KGgo= A6EHv_POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg=
""".split()  # noqa: SIM905 - words, not punctuation

texts: Final = st.sampled_from([*_TEXTS, "long " * 1000]) | st.text(max_size=8)
_leaves: Final = (
    st.sampled_from([None, True, False, 0, -1, 7, 2**63, 10**400, 0.5, 1e308, math.nan]) | texts
)
_values: Final = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=5)
    ),
    max_leaves=8,
)
values: Final[st.SearchStrategy[Any]] = (
    st.dictionaries(st.sampled_from(_KEYS), _values, max_size=8) | _values
)
bodies: Final = values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=80)
headers: Final = st.dictionaries(
    st.sampled_from(["retry-after", "x-fal-request-id", "x-fal-needs-retry", "x-fal-retryable"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=30)
    | st.sampled_from(["0", "nan", "Thu, 01 Jan 2026 00:00:42 GMT", "req-1"]),
).map(lambda given: httpx.Headers([(k.encode(), v.encode("latin-1")) for k, v in given.items()]))
answers: Final = st.builds(
    ProviderResponse,
    st.sampled_from([200, 201, 202, 204, 301, 400, 401, 402, 404, 408, 422, 429, 500, 503, 504])
    | st.integers(100, 599),
    headers,
    bodies,
    st.floats(0, 2e9),
)
_modes: Final[tuple[Mode, ...]] = ("queue", "sync")
tickets: Final = st.builds(
    Ticket,
    id=st.just("pred_1"),
    model=st.sampled_from(["nano-banana", "fal-ai/flux/dev", "workflows/a/b/c", "comfy/a/b"]),
    mode=st.sampled_from(_modes),
    input=st.sampled_from([{}, {"prompt": "x"}, {"prompt": None, "input_image": []}]),
    provider_id=st.just("req-1"),
    submitted_at=st.none() | st.floats(0, 2e9),
)
