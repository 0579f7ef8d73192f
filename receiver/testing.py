"""What a handler author needs in tests: an event as they come, and a run as dispatch does it.

```python
from receiver.testing import make_event, run


def test_announces_the_picture() -> None:
    event = make_event("succeeded", output=["https://cdn.example/a.png"])
    result = run(announce, event, files={"https://cdn.example/a.png": PNG})
    assert result.state == "done"
```
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from receiver.dispatch.registry import Handler, handlers_of
from receiver.dispatch.runner import Attempt, Tools
from receiver.model import (
    DONE,
    Decision,
    Error,
    ErrorCode,
    Event,
    Mode,
    Output,
    Policy,
    Prediction,
    Status,
    decide,
    delivery_id,
    event_id,
    new_id,
    utc,
)
from receiver.store.values import Addition, Claim

_NOW = 1_780_000_000.0


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
) -> Event:
    """Make the event of a prediction that has ended; texts in `output` are URLs."""
    prediction_id = new_id("pred", _NOW)
    succeeded = type == "succeeded"
    code: ErrorCode = "canceled" if type == "canceled" else error[0]
    message = "canceled" if type == "canceled" else error[1]
    return Event(
        id=event_id(prediction_id),
        type=f"prediction.{type}",  # type: ignore[arg-type] # the three words make the three types
        time=utc(_NOW),
        channel="webhook",
        raw=raw,
        prediction=Prediction(
            id=prediction_id,
            provider=provider,
            model=model,
            status=Status(type),
            mode="queue",
            input=input or {"prompt": "a lighthouse"},
            metadata=metadata or {},
            provider_id="req-0001",
            output=[_output(item) for item in output] if succeeded else None,
            error=None if succeeded else Error(code=code, message=message),
            channel="webhook",
            created_at=utc(_NOW - 10),
            submitted_at=utc(_NOW - 9),
            completed_at=utc(_NOW),
        ),
    )


def _output(item: str | Output) -> Output:
    return Output(url=item) if isinstance(item, str) else item


@dataclass
class Result:
    """How a run ended, and what the handler did by its context."""

    state: Literal["pending", "done", "skipped", "dead"]
    """As the delivery's state would be; `pending` means it would be tried again."""
    reason: str = ""
    error: BaseException | None = None
    """What the handler raised, if that was no decision of its."""
    submitted: list[Prediction] = field(default_factory=list)
    """The predictions it chained."""
    steps: dict[str, str] = field(default_factory=dict)
    """What `ctx.once` remembered, as JSON: give it to the next run to try a retry."""


def run(
    handler: Callable[..., Any],
    event: Event,
    *,
    attempt: int = 1,
    files: Mapping[str, bytes] | None = None,
    http: Callable[[httpx.Request], httpx.Response] | None = None,
    steps: Mapping[str, str] | None = None,
) -> Result:
    """Run a decorated handler once, as dispatch would, without a database or a network.

    `files` is what `ctx.fetch` finds, by URL; `http` answers what `ctx.http` sends; `steps` are
    the sub-steps that an earlier attempt has done.
    """
    found = next(h for h in handlers_of(handler))
    world = _World(dict(files or {}), http or _refuse, dict(steps or {}))
    return asyncio.run(world.run(found, event, attempt))


def _refuse(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError(f"this test gave no answer for {request.url}", request=request)


class _World:
    """The outer edge: a memory, a network and an outbound that only this run sees."""

    def __init__(
        self,
        files: dict[str, bytes],
        http: Callable[[httpx.Request], httpx.Response],
        steps: dict[str, str],
    ) -> None:
        self._files = files
        self._http = http
        self._steps = steps
        self._submitted: list[Prediction] = []
        self._additions: list[Addition] = []

    async def run(self, handler: Handler, event: Event, attempt: int) -> Result:
        claim = Claim(
            id=delivery_id(event.prediction.id, handler.name),
            handler=handler.name,
            attempt=attempt,
            round=0,
            number=attempt,
            event=event,
        )
        async with (
            httpx.AsyncClient(transport=httpx.MockTransport(self._http)) as http,
            httpx.AsyncClient(transport=httpx.MockTransport(self._file)) as results,
        ):
            tried = Attempt(handler, claim, Tools(self, self.submit, http, results))
            failure = await tried.run()
        policy = handler.retry.policy(Policy())
        decision: Decision = decide(attempt, failure, policy, 0.5) if failure else DONE
        return Result(decision.state, decision.reason, tried.error, self._submitted, self._steps)

    async def recall(self, delivery_id: str, key: str) -> str | None:  # noqa: ARG002 - the protocol's
        return self._steps.get(key)

    async def remember(self, delivery_id: str, key: str, result: str) -> None:  # noqa: ARG002
        self._steps[key] = result

    async def add(self, addition: Addition) -> None:
        self._additions.append(addition)

    async def submit(
        self,
        provider: str,
        model: str,
        input: dict[str, Any],
        *,
        metadata: dict[str, Any],
        mode: Mode,
        parent_id: str,
        idempotency_key: str,  # noqa: ARG002 - the protocol's
    ) -> Prediction:
        prediction = Prediction(
            id=new_id("pred", _NOW),
            provider=provider,
            model=model,
            status=Status.PROCESSING,
            mode=mode,
            input=input,
            metadata=metadata,
            parent_id=parent_id,
            created_at=utc(_NOW),
        )
        self._submitted.append(prediction)
        return prediction

    def _file(self, request: httpx.Request) -> httpx.Response:
        content = self._files.get(str(request.url))
        return httpx.Response(404) if content is None else httpx.Response(200, content=content)
