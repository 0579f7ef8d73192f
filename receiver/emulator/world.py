"""The state that the emulated providers share, and the acceptance of submits."""

import asyncio
import random
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from receiver.emulator import pictures, prompts, wire
from receiver.emulator.callback_sender import Callback, CallbackSender, Timers
from receiver.emulator.faults import Faults, Rule
from receiver.emulator.ledger import Ledger, Prediction
from receiver.emulator.lifecycle import Lifecycle
from receiver.emulator.options import Options, Provider, Schedule
from receiver.emulator.push_faults import PushFaults

NO_SUCH_MODEL = "no-such-model"
TEXT_ONLY = "text-only"
_EARLY_PATIENCE = 1.0
_MINUTE = 60

_STALE = 600
"""Age of a stale signature, in seconds."""

Body = Callable[[Prediction], bytes]
Headers = Callable[[Prediction, bytes], Mapping[str, str]]


class World:
    """One emulator's state."""

    def __init__(self, options: Options, now: Callable[[], float] = time.time) -> None:
        self.options = options
        self.now = now
        self.rng = random.Random(options.seed)  # noqa: S311 - variety, not secrecy
        self._named = 0
        self._request_times: dict[tuple[Provider, str], deque[float]] = defaultdict(deque)
        self.ledger = Ledger(options.ledger_size, now)
        self.faults = Faults(self.rng)
        self.timers = Timers(now)
        self.callbacks = CallbackSender(self.timers, options.time_scale)
        self.push_faults = PushFaults(self.faults, self.timers)
        self.lifecycle = Lifecycle(self.timers)

    async def close(self) -> None:
        self.timers.closed = True
        await self.callbacks.close()

    def is_known_key(self, key: str) -> bool:
        keys = self.options.api_keys
        return bool(key) if keys is None else key in keys

    def account(self, key: str) -> str:
        """Return the account of a key."""
        return "everybody" if self.options.one_account else key

    def authenticate(self, key: str, otherwise: Response) -> str:
        """Return the account of a key; raise Refusal with `otherwise` if the key is unknown."""
        if not self.is_known_key(key):
            raise wire.Refusal(otherwise)
        return self.account(key)

    def old(self) -> bool:
        """Return whether the next answer has the older shape."""
        shape = self.options.shape
        return shape == "old" or (shape == "mixed" and self.rng.random() < 0.5)  # noqa: PLR2004 - evens

    def new_id(self) -> str:
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def _id_for(self, provider: Provider) -> str:
        """Return a new id; a readable one, such as `fal-1`, if `by_hand` is set."""
        self._named += 1
        return self.new_id() if self.options.by_hand is None else f"{provider}-{self._named}"

    def prediction(
        self,
        provider: Provider,
        request: Request,
        account: str,
        model: str,
        inputs: Mapping[str, Any],
        **more: Any,
    ) -> Prediction:
        """Return a new prediction, not accepted yet."""
        prompt = wire.text_of(inputs.get("prompt"))
        return Prediction(
            provider=provider,
            id=self._id_for(provider),
            model=model,
            account=account,
            input=dict(inputs),
            prompt=prompt,
            plan=prompts.read(prompt, inputs, self.options, self.rng),
            origin=wire.origin(request),
            old=self.old(),
            variant=self.rng.getrandbits(8),
            submitted_at=self.now(),
            **more,
        )

    def rejected(self, provider: Provider, response: Response) -> wire.Refusal:
        """Count a refused submit; return the exception to raise."""
        self.ledger.count(provider, "rejected")
        return wire.Refusal(response)

    def is_full(self, provider: Provider, account: str, limit: int | None) -> bool:
        """Return whether an account has reached its limit of unfinished predictions."""
        if limit is None or self.lifecycle.in_flight(provider, account) < limit:
            return False
        self.ledger.violation(provider, "in_flight", str(limit))
        return True

    def wait_for_rate(self, provider: Provider, account: str, limit: int | None) -> int | None:
        """Count a request; return the seconds to wait if the account exceeds its minute's limit."""
        if limit is None:
            return None
        times, now = self._request_times[provider, account], self.now()
        while times and times[0] <= now - _MINUTE:
            times.popleft()
        if len(times) >= limit:
            self.ledger.violation(provider, "per_minute", str(limit))
            return int(times[0] + _MINUTE - now) + 1
        times.append(now)
        return None

    def refusal(self, provider: Provider, prompt: str) -> Rule | None:
        """Return the rule that refuses this submit; hang up if a rule drops it unbilled."""
        if self.faults.take("drop_submit", provider, prompt):
            raise wire.Refusal(wire.HangUp())
        return self.faults.take("refuse_submit", provider, prompt)

    def bill(self, predictions: Sequence[Prediction]) -> None:
        """Record predictions and start them: from here on they cost money."""
        self.ledger.count(predictions[0].provider, "submits")
        for prediction in predictions:
            self.ledger.add(prediction)
            self.lifecycle.start(prediction)

    async def accept(self, predictions: Sequence[Prediction], response: Response) -> Response:
        """Bill, start and answer; a fault may call back first, or hang up instead of the answer."""
        self.bill(predictions)
        first = predictions[0]
        if rule := self.faults.take("early_callback", first.provider, first.prompt):
            await self._finish_early(predictions, rule.seconds)
        if rule := self.faults.take("stall_submit", first.provider, first.prompt):
            return wire.HangUp(rule.seconds or 0)
        return response

    async def run(self, prediction: Prediction, seconds: float | None = None) -> Prediction:
        """Bill a prediction whose caller waits for its end; wait for it, `seconds` at most."""
        prediction.blocking = True
        self.bill([prediction])
        if rule := self.faults.take("stall_submit", prediction.provider, prediction.prompt):
            raise wire.Refusal(wire.HangUp(rule.seconds or 0))
        if self.options.by_hand is not None:
            self.lifecycle.end(prediction)  # the test is blocked and cannot end it
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await prediction.until(lambda p: p.finished)
        return prediction

    def send_callbacks(
        self, provider: Provider, body: Body, headers: Headers, schedule: Schedule
    ) -> Callable[[Prediction], None]:
        """Register and return a function that calls back at the end, if there is a URL."""

        def send(ended: Prediction) -> None:
            if ended.callback_url:
                self.push(ended, body(ended), headers, schedule)

        self.lifecycle.on_finish[provider] = send
        return send

    def signing(self, prediction: Prediction, at: float | None) -> tuple[int, bool]:
        """Return the time to sign a callback with, and whether to sign it with a wrong key."""
        about = prediction.provider, prediction.prompt
        seconds = int(self.now() if at is None else at)
        if rule := self.faults.take("stale_timestamp", *about):
            seconds -= int(_STALE if rule.seconds is None else rule.seconds)
        return seconds, self.faults.take("wrong_signature", *about) is not None

    def push(
        self, prediction: Prediction, body: bytes, headers: Headers, schedule: Schedule
    ) -> None:
        """Send a callback to the URL of the submit, with the retries of `schedule`."""
        self.push_faults.push(
            prediction,
            lambda: self.callbacks.send(
                Callback(prediction, body, lambda: headers(prediction, body), schedule)
            ),
        )

    def find_polled(
        self, provider: Provider, prediction_id: str, account: str
    ) -> Prediction | None:
        """Return the polled prediction and count the poll; a fault may break the answer."""
        self.ledger.count(provider, "polls")
        prediction = self.ledger.find(provider, prediction_id, account)
        rule = self.faults.take("break_poll", provider, prediction.prompt if prediction else "")
        if rule:
            raise wire.Refusal(broken_response(rule))
        if prediction:
            prediction.polls += 1
        return prediction

    async def _finish_early(self, predictions: Sequence[Prediction], seconds: float | None) -> None:
        for prediction in predictions:
            self.lifecycle.finish(prediction)
        with suppress(TimeoutError):
            async with asyncio.timeout(_EARLY_PATIENCE if seconds is None else seconds):
                for prediction in predictions:
                    await prediction.until(lambda p: bool(p.callback_attempts))


def broken_response(rule: Rule) -> Response:
    """Return the broken response that a rule specifies."""
    if rule.answer == "garbage":
        return Response("<html>not what you wanted", media_type="text/html")
    status = 404 if rule.answer == "missing" else 500
    return wire.answer({"error": {"message": "broken on request"}}, status)


def picture_names(prediction: Prediction) -> list[str]:
    """Return the names of a prediction's pictures: as many as requested, one to four."""
    inputs = prediction.input
    count_text = str(inputs.get("num_images") or inputs.get("num_outputs") or 1)
    count = min(max(int(count_text), 1), 4) if count_text.isdecimal() else 1
    ratio = wire.text_of(inputs.get("aspect_ratio"))
    first = prediction.index
    return [pictures.name_for(prediction.prompt, first + n, ratio) for n in range(count)]


def output_of(world: World, prediction: Prediction) -> list[dict[str, Any]] | str:
    """Return the files of a prediction, by URL or as data URIs, or its text."""
    planned = prediction.plan.ending.output
    if planned is not None:
        return planned if isinstance(planned, str) else [dict(file) for file in planned]
    names = picture_names(prediction)
    rule = world.faults.take("large_output", prediction.provider, prediction.prompt)
    if rule or prediction.input.get("sync_mode") is True:
        return [{"url": pictures.data_uri(name, rule.size if rule else 0)} for name in names]
    return [{"url": f"{prediction.origin}/files/{name}"} for name in names]
