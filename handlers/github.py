"""Start a GitHub workflow with every event.

Use: `GITHUB_TOKEN=… GITHUB_REPOSITORY=owner/name receiver serve github`.

The event is {type, time, event_id, delivery, channel, prediction, left_out}. GitHub accepts 64 KB:
of a larger event, the largest of the prediction's input, metadata and output are left out;
`left_out` names them. `delivery` is the same for all retries: it identifies a repeat after a lost
answer.
"""

import re
import time
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from receiver import Context, Dead, Event, Retry, expect, on, read_settings

MOST_BYTES = 65_000  # of 65,535, as GitHub does not specify how it counts
LONGEST_TYPE = 100
LONGEST_MESSAGE = 200
LEAST_WAIT = 60.0  # seconds, GitHub's minimum if it names no time
LIMITED = {403, 429}
FINAL = frozenset(range(300, 500)) - {408, 409, 425, 429}
MAY_GO = ("input", "metadata", "output")


def repository(text: str) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text, re.ASCII):
        raise ValueError(f"must be owner/name, not {text[:80]!r}")
    return text


with read_settings() as read:
    TOKEN = read.secret(
        "GITHUB_TOKEN",
        "a token that may write the repository's contents, or its actions for GITHUB_WORKFLOW",
        r"[\w.-]+",
    )
    REPOSITORY = read.parsed("GITHUB_REPOSITORY", "owner/name", repository)
    WORKFLOW = read.matching(
        "GITHUB_WORKFLOW",
        "the file name or id of a workflow to start. Without it the event goes to all that have "
        "`on: repository_dispatch`, with its type as `event_type`",
        r"[^\s\"']+",
        default="",
    )
    REF = read.text("GITHUB_REF", "the branch or tag to run the workflow on", default="main")
    INPUT = read.text(
        "GITHUB_INPUT", "the workflow's input that gets the event as JSON", default="event"
    )
    API_URL = read.url(
        "GITHUB_API_URL", "where the API is", default="https://api.github.com", secure=True
    )

PATH = f"actions/workflows/{quote(WORKFLOW, safe='')}/dispatches" if WORKFLOW else "dispatches"
URL = f"{API_URL}/repos/{REPOSITORY}/{PATH}"
HEADERS = {
    "accept": "application/vnd.github+json",
    "authorization": f"Bearer {TOKEN.reveal()}",
    "content-type": "application/json",
    "user-agent": "prediction-receiver",
    "x-github-api-version": "2022-11-28",
}


@on("*", name="github", timeout=30, after="save")
async def github(event: Event, ctx: Context) -> None:
    async def dispatch() -> None:
        body = fitting(event, ctx.idempotency_key)
        check(await ctx.http.post(URL, content=body, headers=HEADERS))

    await ctx.once("dispatch", dispatch)


def fitting(event: Event, delivery: str) -> bytes:
    """Return the body; while it is too large, leave out the largest remaining part."""
    prediction = msgspec.to_builtins(event.prediction)
    payload: dict[str, Any] = {
        "type": event.type,
        "time": event.time,
        "event_id": event.id,
        "delivery": delivery,
        "channel": event.channel,
        "prediction": prediction,
        "left_out": [],
    }
    body = request_body(event, payload)
    for name in sorted(MAY_GO, key=lambda name: size(prediction.get(name)), reverse=True):
        if len(body) <= MOST_BYTES:
            break
        prediction.pop(name, None)
        payload["left_out"].append(name)
        body = request_body(event, payload)
    return body


def size(value: Any) -> int:
    return len(msgspec.json.encode(value))


def request_body(event: Event, payload: dict[str, Any]) -> bytes:
    if WORKFLOW:
        payload_json = msgspec.json.encode(payload).decode()
        return msgspec.json.encode({"ref": REF, "inputs": {INPUT: payload_json}})
    return msgspec.json.encode({"event_type": event.type[:LONGEST_TYPE], "client_payload": payload})


def check(answer: httpx.Response) -> None:
    reason = f"HTTP {answer.status_code}: {message(answer)}"
    if answer.status_code in LIMITED and (after := wait(answer)) is not None:
        raise Retry(reason, after=after)
    if answer.status_code in FINAL:
        raise Dead(reason)
    expect(answer)


def message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["message"])[:LONGEST_MESSAGE]
    except (ValueError, LookupError, TypeError):
        return answer.reason_phrase


def wait(answer: httpx.Response) -> float | None:
    """Return the seconds to wait after a rate limit; None for any other refusal."""
    retry_after, remaining, reset = (
        answer.headers.get(name, "")
        for name in ("retry-after", "x-ratelimit-remaining", "x-ratelimit-reset")
    )
    if retry_after.isdecimal():
        return max(float(retry_after), 1.0)
    if remaining == "0" and reset.isdecimal():
        return max(float(reset) - time.time(), 1.0)
    is_limit = answer.status_code not in FINAL or "rate limit" in message(answer).lower()
    return LEAST_WAIT if is_limit else None
