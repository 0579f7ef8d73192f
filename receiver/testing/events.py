"""Events for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

from receiver.model.ids import event_id, new_id
from receiver.model.values import Error, ErrorCode, Event, Output, Prediction, Status, utc

NOW: Final = 1_780_000_000.0


def make_event(
    type: Literal["succeeded", "failed", "canceled"] = "succeeded",
    *,
    provider: str = "fal",
    model: str = "fal-ai/nano-banana",
    input: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    output: Sequence[str | Output] = ("https://cdn.example/a.png",),
    error: tuple[ErrorCode, str] = ("provider_error", "model timed out"),
    raw: Any = None,
    reply_to: str | None = None,
) -> Event:
    """Return the event of an ended prediction; texts in `output` are URLs."""
    prediction_id = new_id("pred", NOW)
    succeeded = type == "succeeded"
    why: tuple[ErrorCode, str] = ("canceled", "canceled") if type == "canceled" else error
    return Event(
        id=event_id(prediction_id),
        type=f"prediction.{type}",  # type: ignore[arg-type] # the three words make the three types
        time=utc(NOW),
        channel="webhook",
        raw=raw,
        prediction=Prediction(
            id=prediction_id,
            provider=provider,
            model=model,
            status=Status(type),
            mode="queue",
            input={"prompt": "a lighthouse"} if input is None else input,
            metadata=metadata or {},
            provider_id="req-0001",
            output=[_output(item) for item in output] if succeeded else None,
            error=None if succeeded else Error(code=why[0], message=why[1]),
            channel="webhook",
            created_at=utc(NOW - 10),
            submitted_at=utc(NOW - 9),
            completed_at=utc(NOW),
            reply_to=reply_to,
        ),
    )


def _output(item: str | Output) -> Output:
    return Output(url=item) if isinstance(item, str) else item
