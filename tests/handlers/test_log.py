"""`log` writes one line for every outcome."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from structlog.testing import capture_logs

from receiver import Event
from receiver.testing import Kit, make_event
from tests.handlers.parts import built_in


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (make_event(), ("prediction.succeeded", 1, None)),
        (make_event(output=[]), ("prediction.succeeded", 0, None)),
        (
            make_event("failed", error=("content_policy", "no")),
            ("prediction.failed", 0, "content_policy"),
        ),
        (make_event("canceled"), ("prediction.canceled", 0, "canceled")),
    ],
)
def test_outcome_is_logged_in_exactly_one_line(
    receiver_kit: Callable[..., Kit], event: Event, expected: tuple[Any, ...]
) -> None:
    with capture_logs() as lines:
        delivered = receiver_kit(built_in("log")).deliver(event, times=3)
    assert delivered.delivery.state == "done"
    [line] = [line for line in lines if line["event"].startswith("prediction.")]
    assert (line["event"], line["outputs"], line["error"]) == expected
    assert (line["provider"], line["handler"]) == ("fal", "log")
    assert line["prediction"] == delivered.prediction_id
