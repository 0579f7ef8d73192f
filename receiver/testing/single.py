"""Run a handler once, without a database or a network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import httpx

from receiver.deliveries.attempt import Attempt
from receiver.deliveries.context import Tools
from receiver.deliveries.handlers import Facts, Handler
from receiver.deliveries.registry import handlers_of
from receiver.model.errors import HandlerError
from receiver.model.ids import delivery_id, new_id
from receiver.model.requests import SubmitRequest
from receiver.model.retry import DONE, Policy, decide
from receiver.model.sealing import Seals
from receiver.model.values import Event, Prediction, Status, Stored, utc
from receiver.store.deliveries import Claim
from receiver.store.predictions import Annotation
from receiver.testing.edge import Answer, responding, serving_files
from receiver.testing.events import NOW

_SEALS: Final = Seals(["the-secret-key-of-nothing-but-a-test"])


@dataclass
class Result:
    """How a run ended, and what the handler did with its context."""

    state: Literal["pending", "done", "skipped", "dead"]
    """The state that the delivery would have; `pending`: it would be tried again."""
    reason: str = ""
    error: BaseException | None = None
    """The exception that the handler raised, unless Retry, Skip or Dead."""
    submitted: list[Prediction] = field(default_factory=list)
    """The predictions that it submitted."""
    stored: dict[int, Stored] = field(default_factory=dict)
    """The values passed to `ctx.record_stored`, by the place of the output."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The values added to the prediction's metadata."""
    note: str = ""
    """The text passed to `ctx.note`."""
    steps: dict[str, str] = field(default_factory=dict)
    """The results that `ctx.once` remembered, as JSON: pass it to the next run to test a retry."""


def run(
    handler: Callable[..., Any],
    event: Event,
    *,
    attempt: int = 1,
    files: Mapping[str, bytes] | None = None,
    http: Answer | None = None,
    steps: Mapping[str, str] | None = None,
    private: Mapping[str, Any] | None = None,
) -> Result:
    """Run a decorated handler once, as dispatch would, without a database or a network.

    `files` has the contents for `ctx.fetch`, by URL; `http` answers the requests of `ctx.http`;
    `steps` are the results of an earlier attempt's sub-steps; `private` becomes `ctx.private`.
    """
    found = next(iter(handlers_of(handler)), None)
    if found is None:
        raise HandlerError(f"{handler!r} is a way in: have a receiver_kit call it")
    one = event.prediction
    refusal = found.refuses(Facts(event.type, one.provider, one.model, one.metadata, one.reply_to))
    if refusal is not None:
        raise HandlerError(f"{found.name} does not take this event: {refusal}")
    stand_in = _StandIn(files or {}, http, dict(steps or {}))
    return asyncio.run(stand_in.run(found, event, attempt, private or {}))


class _StandIn:
    """A replacement of the store, the network and the submitter for one run."""

    def __init__(
        self, files: Mapping[str, bytes], http: Answer | None, steps: dict[str, str]
    ) -> None:
        self._files = files
        self._http = http
        self._result = Result("pending", steps=steps)

    async def run(
        self, handler: Handler, event: Event, attempt: int, private: Mapping[str, Any]
    ) -> Result:
        claim = Claim(
            id=delivery_id(event.prediction.id, handler.name),
            handler=handler.name,
            attempt=attempt,
            round=0,
            number=attempt,
            event=event,
            private=_SEALS.seal(private).decode(),
        )
        async with (
            httpx.AsyncClient(transport=responding(self._http)) as http,
            httpx.AsyncClient(transport=serving_files(self._files)) as results,
        ):
            tried = Attempt(handler, claim, Tools(self, self.submit, http, results, _SEALS))
            failure = await tried.run()
        policy = handler.retry.policy(Policy())
        decision = decide(attempt, failure, policy, 0.5) if failure else DONE
        result = self._result
        result.state, result.reason = decision.state, decision.reason
        result.error, result.note = tried.error, tried.note
        return result

    async def recall(self, delivery_id: str, key: str) -> str | None:  # noqa: ARG002 - the protocol's
        return self._result.steps.get(key)

    async def remember(self, delivery_id: str, key: str, result: str) -> str:  # noqa: ARG002
        return self._result.steps.setdefault(key, result)

    async def annotate(self, addition: Annotation) -> None:
        self._result.stored |= addition.stored
        self._result.metadata |= addition.metadata

    async def submit(self, request: SubmitRequest) -> Prediction:
        prediction = Prediction(
            id=new_id("pred", NOW),
            provider=request.provider,
            model=request.model,
            status=Status.PROCESSING,
            mode=request.mode,
            input=request.input,
            metadata=dict(request.metadata),
            parent_id=request.parent_id,
            depth=1,
            created_at=utc(NOW),
        )
        self._result.submitted.append(prediction)
        return prediction
