"""Error codes: for messages of models in use, and for ones that only look like refused content."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from receiver.model.values import Mode, Outcome, Ticket
from receiver.providers import parsing
from receiver.providers.adapter import (
    Ambiguous,
    Follow,
    Postponed,
    ProviderResponse,
    Refused,
)
from receiver.providers.codes import code_of, plain
from tests.conftest import Start
from tests.providers.samples import providers
from tests.receiving import Network, reply

PROVIDERS: Final = providers()

REFUSALS: Final = """
Your request was rejected as a result of our safety system. Your prompt may contain text that is …
Your request was rejected by the safety system. safety_violations=[sexual].
Error code: 400 - {'error': {'code': 'moderation_blocked', 'type': 'image_generation_user_error'}}
Error code: 400 - {'error': {'code': 'content_policy_violation', 'message': 'no'}}
The response was filtered due to the prompt triggering Azure OpenAI's content management policy.
ResponsibleAIPolicyViolation
The prompt could not be submitted. It contains sensitive words that violate Responsible AI practices
All images were filtered out because they violated Vertex AI's usage guidelines.
Veo could not generate videos because the input image violates Vertex AI's usage guidelines.
Video generation blocked by safety filters
All generated images were filtered by safety.
The response was blocked: finishReason IMAGE_SAFETY
finish_reason: PROHIBITED_CONTENT
Gemini returned no image (finish reason: SAFETY)
Candidate stopped with RECITATION
Sorry, we can't create videos with real people's names or likenesses.
Person Generation is not allowed
ModelError: The input or output was flagged as sensitive. Please try again. (E005) (uIJ6l3ruRD)
NSFW content detected. Try running it again, or try a different prompt.
Potential NSFW content was detected in one or more images. A black image will be returned.
Request Moderated
Content Moderated
OutputImageSensitiveContentDetected
InputImageSensitiveContentDetected.PrivacyInformation
InputTextRiskDetection
The request failed because the output image may contain sensitive information. Request id: 0217
DataInspectionFailed
Input data may contain inappropriate content.
IPInfringementSuspect: Input data is suspected of being involved in IP infringement.
Failure to pass the risk control system
output new_sensitive
input new_sensitive, please modify your prompt
视频生成失败: 内容不符合规范
SAFETY.INPUT.TEXT
SAFETY.OUTPUT.VIDEO
INPUT_PREPROCESSING.SAFETY.THIRD_PARTY
Your request was blocked by this model provider's content moderation system.
frame moderation failed
Prompt not allowed
Prompt failed safety check
Image did not pass the safety check
Banned prompt detected
Banned words in prompt
The input did not pass moderation
The prompt didn@t pass our moderation
The image violates our content guidelines
Stopped by guardrails
This content is not allowed by our policy
This request was blocked due to copyright restrictions
Copyrighted characters are not permitted
The image may depict a public figure
explicit content was found
The text is sexually suggestive
The prompt was rejected: violence
The image contains graphic violence
The content could not be processed because it contained material flagged by a content checker.
The images may contain likenesses of real people or other private information.
the prompt was flagged by the content checker
Prompt was blocked by the content policy
input was flagged by the content moderation system
Rejected by content moderation
Your prompt was flagged as violating content policies
The video may violate our terms of service
Safety checker triggered
Content policy violation
The image was flagged
your prompt violates our usage policies
""".strip().replace("@", "\N{RIGHT SINGLE QUOTATION MARK}")

OTHERS: Final = """
safety_tolerance: Input should be less than or equal to 6
enable_safety_checker: field required
enable_safety_checker was rejected
moderation: must be one of low, auto
content_moderation: Input should be a valid boolean
Unexpected keyword argument 'safety_checker'
unknown parameter: safety_settings
safety_filter_level is not a valid option
rate limit policy
Request rejected by rate limit policy of your organization
violates the rate limit policy
blocked by cache policy
Blocked by CORS policy
prohibited by organization policy constraint
the request was blocked by the firewall
CUDA out of memory
Parameter names are case-sensitive
The image name is case-sensitive and was not found
duplicate key value violates unique constraint "x"
input violates schema rules
request flagged as duplicate
Content-Type not allowed
unsupported content type
403 Client Error: Forbidden for url: https://files.example/y.png
Failed to download the file
Safety checker failed to load: out of memory
Content moderation service unavailable
The moderation service is overloaded, try again
Model not found: nsfw-detector
The URL contains unsafe characters
Failed to detect explicit dimensions
image not allowed together with video
child process exited with 1
could not detect a face in the image
INTERNAL.BAD_OUTPUT.CODE01
Invalid status code: 422
prompt is too long
Insufficient credits
time is money
""".strip()

TIMEOUTS: Final = """
request timed out
Timeout of 60 s
Deadline exceeded
The generation took too long
""".strip()

TEXTS: Final = [
    *((text, "content_policy") for text in REFUSALS.splitlines()),
    *((text, "provider_error") for text in OTHERS.splitlines()),
    *((text, "timeout") for text in TIMEOUTS.splitlines()),
]


def test_error_message_determines_the_code() -> None:
    assert {text: parsing.failure(text).code for text, _ in TEXTS} == dict(TEXTS)


def test_refused_submit_is_rejected_or_content_policy_by_its_message() -> None:
    for text, code in TEXTS:
        expected = Refused(text, "content_policy" if code == "content_policy" else "rejected")
        assert parsing.refusal(text) == expected
        assert parsing.settle_submit(ProviderResponse(422, {}, b""), text, blocks=True) == expected


@pytest.mark.parametrize(
    ("message", "hint", "code"),
    [
        ("no", "content_policy_violation", "content_policy"),
        ("no", "content_moderation", "content_policy"),
        ("no", "content_filter", "content_policy"),
        ("no", "safety", "content_policy"),
        ("no", "SensitiveContentDetected.Violence", "content_policy"),
        ("field required", "content_policy_violation", "content_policy"),
        ("timed out", "content_moderation", "content_policy"),
        ("NSFW content detected", "generation_timeout", "timeout"),
        ("NSFW content detected", "literal_error", "provider_error"),
        ("NSFW content detected", "value_error.missing", "provider_error"),
        ("NSFW content detected", "value_error", "content_policy"),
        ("NSFW content detected", "unknown", "content_policy"),
        ("no", "moderation_timeout", "timeout"),
        ("no", "image_too_large", "provider_error"),
        ("no", "provider_error", "provider_error"),
        ("deadline exceeded", "internal_server_error", "timeout"),
    ],
)
def test_error_type_takes_precedence_over_the_message(message: str, hint: str, code: str) -> None:
    assert parsing.failure(message, hint).code == code
    assert parsing.failure(message, "", hint).code == code


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("OutputImageSensitiveContentDetected", "output image sensitive content detected"),
        ("SAFETY.INPUT.TEXT", "safety input text"),
        ("ResponsibleAIPolicy", "responsible ai policy"),
        ("It isn't. Is it? NO!", "it is not . is it . no ."),
        ("a_b-c/d 1.5 «é»", "a b c d 1 5 é"),
        ("", ""),
    ],
)
def test_plain_normalizes_text_to_lower_case_words(text: str, words: str) -> None:
    assert plain(text) == words


# --- Through the adapters, on every channel ------------------------------------------------------

FLAGGED: Final = "The content could not be processed: it contained material flagged by a checker."
LIMITS: Final = "safety_tolerance: Input should be less than or equal to 6"


def _body(value: Any) -> bytes:
    return json.dumps(value).encode()


def _fal(text: str) -> dict[str, Any]:
    return {"detail": [{"loc": ["body"], "msg": text, "type": "value_error"}]}


def _result(name: str, act: str, *bodies: tuple[int, Any], mode: Mode = "queue") -> Any:
    """Return the result of an adapter's method for an answer, or for the answer that follows it."""
    ticket = Ticket(id="pred_1", model="a/b", mode=mode, input={}, provider_id="req-1")
    first, *more = (ProviderResponse(status, {}, _body(body)) for status, body in bodies)
    made = getattr(PROVIDERS[name], act)(ticket, first)
    return made.read(ticket, *more) if isinstance(made, Follow) else made


def _pushed(name: str, body: Any) -> Outcome:
    return PROVIDERS[name].read(_body(body))


def _streamed(text: str) -> Any:
    data = {"generation_id": "g", "status": "failed", "error": text}
    oxen: Any = PROVIDERS["oxen"]
    return oxen.streamed("media_generation_completed", json.dumps(data))


CHANNELS: Final[dict[str, Callable[[str], Any]]] = {
    "fal callback": lambda text: _pushed(
        "fal", {"request_id": "r", "status": "ERROR", "error": "422", "payload": _fal(text)}
    ),
    "fal poll": lambda text: _result(
        "fal", "polled", (200, {"status": "COMPLETED"}), (422, _fal(text))
    ),
    "fal status": lambda text: _result(
        "fal", "polled", (200, {"status": "COMPLETED", "error": text})
    ),
    "fal submit": lambda text: _result("fal", "accepted", (422, _fal(text))),
    "fal blocking": lambda text: _result("fal", "accepted", (422, _fal(text)), mode="sync"),
    "eachlabs callback": lambda text: _pushed(
        "eachlabs", {"exec_id": "e", "status": "failed", "output": [{"error": text}], "error": ""}
    ),
    "eachlabs poll": lambda text: _result(
        "eachlabs", "polled", (200, {"id": "e", "status": "error", "output": {"error": text}})
    ),
    "eachlabs submit": lambda text: _result("eachlabs", "accepted", (400, {"error": text})),
    "eachlabs submit, in a yes": lambda text: _result(
        "eachlabs", "accepted", (200, {"status": "error", "message": text})
    ),
    "eachlabs blocking": lambda text: _result(
        "eachlabs", "accepted", (200, {"id": "e", "status": "failed", "error": text}), mode="sync"
    ),
    "oxen stream": _streamed,
    "oxen poll": lambda text: _result(
        "oxen", "polled", (200, {"generation_id": "g", "status": "failed", "error_message": text})
    ),
    "oxen submit, form A": lambda text: _result(
        "oxen", "accepted", (400, {"error": {"type": "invalid_params", "detail": text}})
    ),
    "oxen submit, form B": lambda text: _result(
        "oxen", "accepted", (400, {"error": {"message": text}})
    ),
    "oxen blocking": lambda text: _result(
        "oxen", "accepted", (200, {"error": {"message": text}}), mode="sync"
    ),
}


@pytest.mark.parametrize(("text", "content"), [(FLAGGED, True), (LIMITS, False)])
def test_refused_content_has_one_code_on_every_channel(text: str, *, content: bool) -> None:
    for channel, result_of in CHANNELS.items():
        made = result_of(text)
        error = made if isinstance(made, Refused) else made.error
        assert text in error.message, channel
        codes = {"content_policy"} if content else {"rejected", "provider_error"}
        assert error.code in codes, channel


@pytest.mark.parametrize(
    ("name", "status", "body"),
    [
        ("fal", 422, {"detail": [{"msg": "no", "type": "content_policy_violation"}]}),
        ("fal", 400, {"detail": "no", "error_type": "content_policy_violation"}),
        ("eachlabs", 400, {"error": "no", "classification": {"category": "content_moderation"}}),
        ("eachlabs", 400, {"error": "no", "error_code": "content_policy_violation"}),
        ("eachlabs", 200, {"status": "error", "error_code": "moderation_blocked"}),
        ("oxen", 400, {"error": {"type": "content_policy_violation", "title": "no"}}),
        ("oxen", 400, {"error": {"code": "moderation_blocked", "message": "no"}}),
    ],
)
def test_submit_refused_with_a_content_error_type_is_content_policy(
    name: str, status: int, body: Any
) -> None:
    assert _result(name, "accepted", (status, body)).code == "content_policy"


@pytest.mark.parametrize("mode", ["queue", "sync"])
def test_fal_error_type_in_a_header_alone_determines_the_code(mode: Mode) -> None:
    answer = ProviderResponse(422, {"x-fal-error-type": "content_policy_violation"}, b"{}")
    ticket = Ticket(id="pred_1", model="a/b", mode=mode, input={})
    made = PROVIDERS["fal"].accepted(ticket, answer)
    assert isinstance(made, Refused)
    assert made.code == "content_policy"


@pytest.mark.anyio
@pytest.mark.parametrize("mode", ["queue", "sync"])
@pytest.mark.parametrize(
    ("kind", "code"), [("content_policy_violation", "content_policy"), ("missing", "rejected")]
)
async def test_prediction_has_the_error_code_of_its_refused_submit(
    start: Start, network: Network, mode: Mode, kind: str, code: str
) -> None:
    body = {"detail": [{"loc": ["body", "prompt"], "msg": "no", "type": kind}]}
    network.script(f"fal.{'submit' if mode == 'queue' else 'run'}", reply(body, 422))
    async with start() as station:
        found = await station.submit("fal", mode=mode)
    assert found["status"] == "failed"
    assert found["error"] == {"code": code, "message": "body.prompt: no"}


@pytest.mark.parametrize("hint", ["less_than", "string_too_long", "image_too_large"])
def test_validation_error_type_takes_precedence_over_content_words(hint: str) -> None:
    assert code_of("the prompt was flagged as unsafe", []) == "content_policy"
    assert code_of("the prompt was flagged as unsafe", [hint]) == "provider_error"


@pytest.mark.parametrize("words", ["Gore detected", "nudity in it was refused", "minors flagged"])
def test_forbidden_content_named_in_a_message_is_content_policy(words: str) -> None:
    assert code_of(words, []) == "content_policy"


def test_eachlabs_category_does_not_hide_its_error_code() -> None:
    output = {"error": "no", "error_code": "nsfw", "classification": {"category": "unknown"}}
    failed = _pushed("eachlabs", {"exec_id": "e", "status": "failed", "output": output})
    assert failed.error is not None
    assert failed.error.code == "content_policy"


def test_fal_picture_flagged_as_nsfw_is_still_a_success() -> None:
    content = {"images": [{"url": "https://files.example/1.png"}], "has_nsfw_concepts": [True]}
    outcome = _pushed("fal", {"request_id": "r", "status": "OK", "payload": content})
    assert (outcome.kind, len(outcome.output)) == ("succeeded", 1)


# --- Arbitrary messages --------------------------------------------------------------------------

_WORDS: Final = [*f"{REFUSALS} {OTHERS}".split(), "content_policy", ".", "n't", "\ud800", "ß"]
anything: Final = st.text(max_size=40) | st.lists(st.sampled_from(_WORDS), max_size=30).map(
    " ".join
)


@given(message=anything, hints=st.lists(anything, max_size=4))
def test_failure_of_any_message_has_a_code_and_a_message(message: str, hints: list[str]) -> None:
    error = parsing.failure(message, *hints)
    assert error.code in {"content_policy", "timeout", "provider_error"}
    assert error.message == message or (not message and error.message == "unknown")
    assert parsing.refusal(message, *hints).code in {"content_policy", "rejected"}


@given(status=st.integers(100, 599), message=anything, hint=anything, blocks=st.booleans())
@example(status=504, message="", hint="", blocks=True)
@example(status=524, message="", hint="", blocks=False)
def test_status_alone_decides_the_receipt_of_a_submit(
    status: int, message: str, hint: str, *, blocks: bool
) -> None:
    answer = ProviderResponse(status, {}, b"")
    plainly = parsing.settle_submit(answer, "no", blocks=blocks)
    settled = parsing.settle_submit(answer, message, hint, blocks=blocks)
    assert type(settled) is type(plainly)
    assert settled is None or isinstance(settled, Refused | Postponed | Ambiguous | Outcome)
    # After a gateway's timeout it is not known whether the provider accepted the submit.
    assert isinstance(settled, Ambiguous) == (status in {504, 524})


HOSTILE: Final = [
    "violat ", "violat", "flagged ", "content ", "be ", "as too be ", "a. ", "aA", "aA ",
    "not pass ", "prompt was ", "safety ", "敏感", "敏", "content flag ", "timed", "n't",
]  # fmt: skip


def test_hostile_message_is_classified_in_linear_time() -> None:
    for piece in HOSTILE:
        text = (piece * 2000)[:2000]
        began = time.process_time()
        code_of(text, [text])
        assert time.process_time() - began < 5, piece  # linear: some milliseconds
