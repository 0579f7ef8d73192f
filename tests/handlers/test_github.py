"""`github` sends events to GitHub's REST API, as repository or workflow dispatches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from receiver import Output
from receiver.testing import Kit, make_event
from tests.handlers.parts import Answer, Asked, built_in, waits
from tests.handlers.services import service

Kits = Callable[..., Kit]

TOKEN: Final = "github_pat_11AAAAAAA0abcdefghij_klmnop"
LIMIT: Final = 65_535
DONE: Final[Answer] = (204, {}, b"")


def refusal(status: int, message: str, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    body = {"message": message, "documentation_url": "https://docs.github.com/rest", "status": ""}
    return status, {"content-type": "application/json", **named}, json.dumps(body).encode()


@dataclass
class GitHub:
    """Answers as documented at https://docs.github.com/rest."""

    token: str = TOKEN
    answers: list[Answer] = field(default_factory=list)
    """Answers to the next requests, instead of real ones."""
    asked: int = 0
    dispatched: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Accepted requests: the last part of the path before `dispatches`, and the body."""
    url: str = ""

    def __call__(self, asked: Asked) -> Answer:
        self.asked += 1
        assert asked.method == "POST"
        assert asked.headers["accept"] == "application/vnd.github+json"
        assert asked.headers["x-github-api-version"] == "2022-11-28"
        assert asked.headers["user-agent"] == "prediction-receiver"
        if asked.headers.get("authorization") != f"Bearer {self.token}":
            return refusal(401, "Bad credentials")
        if self.answers:
            return self.answers.pop(0)
        body = json.loads(asked.body)
        repository, _, road = asked.path.removeprefix("/repos/ann/art/").rpartition("dispatches")
        if asked.path == "/repos/ann/art/dispatches":
            problem = self.repository_dispatch(body)
        elif repository == "actions/workflows/publish.yml/" and not road:
            problem = self.workflow_dispatch(body)
        else:
            return refusal(404, "Not Found")
        if problem:
            return refusal(422, problem)
        self.dispatched.append((repository, body))
        return DONE

    def repository_dispatch(self, body: dict[str, Any]) -> str:
        if set(body) != {"event_type", "client_payload"}:
            return "Invalid request."
        if not 0 < len(body["event_type"]) <= 100:
            return "event_type is too long (maximum is 100 characters)"
        if len(body["client_payload"]) > 10:
            return "No more than 10 properties are allowed"
        if len(json.dumps(body["client_payload"], ensure_ascii=False).encode()) > LIMIT:
            return "client_payload is too large."
        return ""

    def workflow_dispatch(self, body: dict[str, Any]) -> str:
        if set(body) != {"ref", "inputs"} or body["ref"] not in {"main", "v1"}:
            return f"No ref found for: {body.get('ref')}"
        if set(body["inputs"]) - {"event", "told"}:
            return f"Unexpected inputs provided: {list(body['inputs'])}"
        if not all(isinstance(value, str) for value in body["inputs"].values()):
            return "Invalid value for input"
        return "inputs are too large." if len(json.dumps(body["inputs"])) > LIMIT else ""

    @property
    def told(self) -> dict[str, Any]:
        """Return the payload of the only dispatch."""
        [(_, body)] = self.dispatched
        payload: dict[str, Any] = body["client_payload"]
        return payload


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch) -> Iterator[GitHub]:
    github = GitHub()
    with service(github) as github.url:
        monkeypatch.setenv("GITHUB_API_URL", f"{github.url}/")
        monkeypatch.setenv("GITHUB_TOKEN", TOKEN)
        monkeypatch.setenv("GITHUB_REPOSITORY", "ann/art")
        for name in ("WORKFLOW", "REF", "INPUT"):
            monkeypatch.delenv(f"GITHUB_{name}", raising=False)
        yield github


@pytest.fixture
def kit(github: GitHub, receiver_kit: Kits) -> Kit:  # noqa: ARG001 - it sets the settings
    return receiver_kit(built_in("github"), online=True)


def test_result_is_sent_as_a_repository_dispatch(github: GitHub, kit: Kit) -> None:
    event = make_event(output=["https://cdn.example/a.png", "https://cdn.example/b.mp4"])
    delivered = kit.deliver(event, times=2)
    assert delivered.delivery.state == "done"
    [(_, body)] = github.dispatched
    assert body["event_type"] == "prediction.succeeded"
    told = body["client_payload"]
    assert told["event_id"] == f"evt_{delivered.prediction_id[5:]}"
    assert told["delivery"] == delivered.delivery.id
    assert told["left_out"] == []
    assert told["prediction"]["id"] == delivered.prediction_id
    assert [output["url"] for output in told["prediction"]["output"]] == [
        "https://cdn.example/a.png",
        "https://cdn.example/b.mp4",
    ]


@pytest.mark.parametrize("kind", ["failed", "canceled"])
def test_failed_and_canceled_predictions_are_dispatched(
    github: GitHub, kit: Kit, kind: Any
) -> None:
    assert kit.deliver(make_event(kind)).delivery.state == "done"
    assert github.told["type"] == f"prediction.{kind}"
    assert github.told["prediction"]["error"]["message"]


def test_workflow_gets_the_event_as_one_input(
    github: GitHub, receiver_kit: Kits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_WORKFLOW", "publish.yml")
    kit = receiver_kit(built_in("github"), online=True)
    kit.deliver(make_event(input={"prompt": 'a "lighthouse"\n${{ secrets.KEY }}'}))
    [(road, body)] = github.dispatched
    assert (road, body["ref"]) == ("actions/workflows/publish.yml/", "main")
    told = json.loads(body["inputs"]["event"])
    assert told["prediction"]["input"]["prompt"] == 'a "lighthouse"\n${{ secrets.KEY }}'


def test_ref_and_input_name_can_be_set(
    github: GitHub, receiver_kit: Kits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_WORKFLOW", "publish.yml")
    monkeypatch.setenv("GITHUB_REF", "v1")
    monkeypatch.setenv("GITHUB_INPUT", "told")
    assert receiver_kit(built_in("github"), online=True).deliver(make_event()).delivery.state == (
        "done"
    )
    assert github.dispatched[0][1]["ref"] == "v1"


@pytest.mark.parametrize("workflow", ["", "publish.yml"])
@pytest.mark.parametrize(
    ("character", "left_out"),
    [("x", ["input"]), ('"', ["input", "metadata"]), ("𝄞", ["input", "metadata"])],
)
def test_oversized_fields_are_left_out_of_the_payload(
    github: GitHub,
    receiver_kit: Kits,
    monkeypatch: pytest.MonkeyPatch,
    workflow: str,
    character: str,
    left_out: list[str],
) -> None:
    """40,000 quotes are 80,000 bytes of JSON, and as many clefs 160,000."""
    monkeypatch.setenv("GITHUB_WORKFLOW", workflow)
    kit = receiver_kit(built_in("github"), online=True)
    event = make_event(
        input={"prompt": "a lighthouse", "image_url": "data:image/png;base64," + 300_000 * "A"},
        metadata={"note": 40_000 * character, "order": 7},
        output=[Output(url="https://cdn.example/a.png")],
    )
    assert kit.deliver(event).delivery.state == "done"
    [(_, body)] = github.dispatched
    told = body.get("client_payload") or json.loads(body["inputs"]["event"])
    assert told["left_out"] == left_out
    assert {"input", "metadata"} - told["prediction"].keys() == set(left_out)
    assert told["prediction"]["output"][0]["url"] == "https://cdn.example/a.png"


def test_oversized_output_is_left_out_and_the_input_is_kept(github: GitHub, kit: Kit) -> None:
    kit.deliver(make_event(output=["data:image/png;base64," + 100_000 * "A"]))
    assert github.told["left_out"] == ["output"]
    assert github.told["prediction"]["input"] == {"prompt": "a lighthouse"}


def test_metadata_is_dispatched_unchanged(github: GitHub, kit: Kit) -> None:
    metadata = {"a": [1, None], "b": {"c": True}, "d": "\u202e```\r\n@everyone"}
    assert kit.deliver(make_event(metadata=metadata)).delivery.state == "done"
    assert github.told["prediction"]["metadata"] == metadata


@pytest.mark.parametrize("status", [403, 429])
def test_primary_rate_limit_is_retried_after_its_reset(
    github: GitHub, kit: Kit, status: int
) -> None:
    reset = str(int(time.time()) + 1800)
    said = "API rate limit exceeded for user ID 1."
    github.answers = [
        refusal(status, said, x_ratelimit_remaining="0", x_ratelimit_reset=reset),
    ]
    delivered = kit.deliver(make_event())
    assert delivered.delivery.reason == f"HTTP {status}: {said}"
    assert delivered.delivery.due_at is not None
    assert 1700 < waits(delivered) <= 1801
    kit.exhaust(delivered)
    assert (delivered.delivery.state, github.asked) == ("done", 2)


@pytest.mark.parametrize("status", [403, 429])
@pytest.mark.parametrize(("headers", "least"), [({"retry_after": "90"}, 90), ({}, 60)])
def test_secondary_rate_limit_is_retried_after_its_wait(
    github: GitHub, kit: Kit, status: int, headers: dict[str, str], least: int
) -> None:
    said = "You have exceeded a secondary rate limit. Please wait a few minutes."
    github.answers = [refusal(status, said, **headers)]
    delivered = kit.deliver(make_event())
    assert waits(delivered) == pytest.approx(least, abs=0.001)
    kit.exhaust(delivered)
    assert (delivered.delivery.state, len(github.dispatched)) == ("done", 1)


def test_rate_limit_reset_in_the_past_uses_the_backoff_of_the_policy(
    github: GitHub, kit: Kit
) -> None:
    past = {"x_ratelimit_remaining": "0", "x_ratelimit_reset": "1700000000"}
    github.answers = [refusal(403, "API rate limit exceeded", **past)]
    delivered = kit.deliver(make_event())
    assert waits(delivered) == pytest.approx(1.0, abs=0.001)  # stored in microseconds
    kit.exhaust(delivered)
    assert delivered.delivery.state == "done"


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (403, "Resource not accessible by personal access token"),
        (404, "Not Found"),
        (422, "Workflow does not have 'workflow_dispatch' trigger"),
        (301, "Moved Permanently"),
    ],
)
def test_permanent_error_ends_dead_with_its_message(
    github: GitHub, kit: Kit, status: int, said: str
) -> None:
    github.answers = [refusal(status, said, x_ratelimit_remaining="4999", x_ratelimit_reset="1")]
    delivered = kit.deliver(make_event())
    assert (delivered.delivery.state, delivered.delivery.reason) == (
        "dead",
        f"HTTP {status}: {said}",
    )


def test_bad_token_ends_dead_and_is_not_revealed(github: GitHub, kit: Kit) -> None:
    github.token = "another"
    delivered = kit.deliver(make_event())
    assert (delivered.delivery.state, delivered.delivery.reason) == (
        "dead",
        "HTTP 401: Bad credentials",
    )
    assert TOKEN not in str(delivered.delivery.history)


@pytest.mark.parametrize("body", [b"", b"<html>Unicorn!</html>", b"null"])
def test_502_and_503_are_retried(github: GitHub, kit: Kit, body: bytes) -> None:
    github.answers = [(502, {}, body), (503, {}, body)]
    delivered = kit.deliver(make_event())
    assert delivered.delivery.state == "pending"
    kit.exhaust(delivered)
    assert (delivered.delivery.state, github.asked) == ("done", 3)


def test_error_without_a_message_is_reported_by_its_status(github: GitHub, kit: Kit) -> None:
    github.answers = [(404, {}, b"[]")]
    assert kit.deliver(make_event()).delivery.reason == "HTTP 404: Not Found"


def test_crash_before_the_handler_runs_dispatches_once(github: GitHub, kit: Kit) -> None:
    assert kit.crash_after_ack(make_event()).delivery.state == "done"
    assert len(github.dispatched) == 1


def test_crash_after_the_handler_ran_does_not_dispatch_again(github: GitHub, kit: Kit) -> None:
    assert kit.crash_after_run(make_event()).delivery.state == "done"
    assert len(github.dispatched) == 1
