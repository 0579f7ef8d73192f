"""The API for plugins' routes and sources: order, submit, cancel, sign, run work later."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Coroutine, Mapping
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import httpx
import msgspec
import structlog

from receiver.http.routes.predictions import Submission, check
from receiver.model.errors import Problem
from receiver.model.requests import OrderRequest, SubmitRequest
from receiver.model.values import LARGEST_METADATA, Mode, Prediction
from receiver.predictions.commands import Command, parse
from receiver.store.predictions import Annotation

if TYPE_CHECKING:  # a plugin imports this module only for its annotations
    from receiver.http.parts import Parts
    from receiver.model.answers import OfferedRecipe

_LONGEST_KEY: Final = 255
_ID: Final = re.compile("pred_[0-9a-f]{32}", re.ASCII)
MOST_LATER: Final = 1000
"""Coroutines of all plugins that may wait or run at once."""


class Door:
    """The receiver's API for a plugin's route or source; made anew for each call of it."""

    def __init__(
        self, via: str, parts: Parts, about: Callable[..., None] = lambda **_: None
    ) -> None:
        self.log = structlog.get_logger("plugin").bind(via=via)
        self._via = via
        self._parts = parts
        self._about = about

    @cached_property
    def http(self) -> httpx.AsyncClient:
        """An httpx.AsyncClient, unguarded: for addresses that you chose yourself."""
        return self._parts.deliveries.http_client()

    @property
    def guarded(self) -> httpx.AsyncClient:
        """The same for addresses from outside: it connects to public addresses only."""
        return self._parts.deliveries.http_client(guarded=True)

    async def order(
        self,
        recipe: str,
        options: Mapping[str, Any],
        *,
        key: str,
        person: str,
        place: str = "",
        metadata: Mapping[str, Any] | None = None,
        private: Mapping[str, Any] | None = None,
        reply_to: str | None = None,
        at: float | None = None,
    ) -> Prediction:
        """Order by a recipe; the order is stored when this returns, and sent soon after.

        A key never expires: the same key returns the same prediction, whatever else is given.
        `at` is when the order was made, in unix seconds, if that was earlier than now.
        Raises Problem with a message for the person who orders.
        """
        await self._parts.deliveries.check_reply_to(reply_to)
        prediction = await self._parts.predictions.orders.order(
            OrderRequest(
                recipe=recipe,
                options=options,
                key=self._key(key),
                person=person,
                place=place,
                via=self._via,
                metadata=metadata or {},
                private=self._sealed(private),
                reply_to=reply_to,
                at=at,
            )
        )
        self._about(prediction=prediction.id)
        return prediction

    async def press(
        self,
        prediction_id: str,
        label: str | None,
        *,
        key: str,
        person: str,
        place: str = "",
        metadata: Mapping[str, Any] | None = None,
        private: Mapping[str, Any] | None = None,
    ) -> Prediction:
        """Order by a button of a prediction's recipe; without a label, order the same again.

        The order is that of the person who presses, with their key and limits. Raises Problem.
        """
        prediction = await self._parts.predictions.orders.press(
            prediction_id,
            label,
            OrderRequest(
                key=self._key(key),
                person=person,
                place=place,
                via=self._via,
                metadata=metadata or {},
                private=self._sealed(private),
            ),
        )
        self._about(prediction=prediction.id)
        return prediction

    async def submit(
        self,
        provider: str,
        model: str,
        input: Mapping[str, Any],
        *,
        key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        mode: Mode = "queue",
        private: Mapping[str, Any] | None = None,
        reply_to: str | None = None,
    ) -> Prediction:
        """Submit without a recipe; it is stored when this returns, and sent soon after.

        The same key returns the same prediction, whatever else is given, until that is deleted.
        Raises Problem for an invalid submission, or one over a limit.
        """
        given = {
            "provider": provider,
            "model": model,
            "input": dict(input),
            "metadata": dict(metadata or {}),
            "mode": mode,
            "reply_to": reply_to,
        }
        try:
            wanted = msgspec.json.decode(msgspec.json.encode(given), type=Submission)
        except (TypeError, ValueError, RecursionError) as error:
            raise Problem(422, "invalid-request", str(error)) from None
        check(wanted)
        await self._parts.deliveries.check_reply_to(reply_to)
        prediction = await self._parts.predictions.service.place(
            SubmitRequest(
                **msgspec.structs.asdict(wanted),
                key=None if key is None else self._key(key),
                private=self._sealed(private),
            )
        )
        self._about(prediction=prediction.id)
        return prediction

    def command(self, text: str) -> Command:
        """Parse a command that a person typed; raise Problem with a message for that person."""
        return parse(self._parts.predictions.orders.book, text)

    def recipes(self) -> list[OfferedRecipe]:
        """Return the recipes that can be ordered."""
        return self._parts.predictions.orders.offered()

    async def prediction(self, prediction_id: str) -> Prediction | None:
        """Return a prediction, or None."""
        if not _ID.fullmatch(prediction_id):
            return None
        return await self._parts.store.predictions.get(prediction_id)

    async def ahead_of(self, prediction: Prediction) -> int:
        """Count the predictions queued at its provider before this one, up to 1,000."""
        return await self._parts.store.predictions.ahead_of(prediction.provider, prediction.id)

    async def annotate(self, prediction_id: str, /, **metadata: Any) -> None:
        """Add JSON values to a prediction's metadata; they replace values with equal names."""
        if len(msgspec.json.encode(metadata)) > LARGEST_METADATA:
            raise Problem(422, "invalid-request", f"metadata has at most {LARGEST_METADATA} bytes")
        found = Annotation(prediction_id=prediction_id, metadata=metadata)
        await self._parts.store.deliveries.annotate(found)

    async def cancel(self, prediction_id: str) -> Prediction:
        """Cancel a prediction at its provider, wait for the result, return it; raise Problem."""
        if not _ID.fullmatch(prediction_id):
            raise Problem(404, "not-found", "no such prediction")
        return await self._parts.predictions.service.cancel(prediction_id)

    def sign(self, value: str, salt: str) -> str:
        """Return a text with its time and a signature, 24 characters longer; not encrypted."""
        return self._parts.predictions.seals.sign(value, salt)

    def open(self, text: str, salt: str, max_age: float | None = None) -> str:
        """Return the text that was signed at most `max_age` seconds ago; raise Unproved."""
        return self._parts.predictions.seals.open(text, salt, max_age)

    def secrets(self, purpose: str) -> list[str]:
        """Return secrets (43 characters of base64url) for a platform that sends its secret back.

        They are derived from the secret keys, newest first: give it the first, and accept any.
        """
        return self._parts.predictions.seals.secrets(purpose)

    def later(self, work: Coroutine[Any, Any, Any]) -> bool:
        """Run work after the answer, which may be lost; return False if too much of it waits."""
        if not inspect.iscoroutine(work):
            raise TypeError(f"later takes a coroutine: an async function, called; not {work!r}")
        if len(self._parts.later) >= MOST_LATER:
            work.close()
            self.log.warning("later.dropped")
            return False
        self._parts.later.start(work, self._via)
        return True

    def _key(self, key: object) -> str:
        """Return a key with the name of its route or source before it; refuse an empty one.

        Otherwise all calls without an id would be one order, and be answered as done.
        """
        if isinstance(key, bool) or not isinstance(key, str | int) or key == "":
            raise Problem(422, "invalid-request", "key: it must be a text that is not empty")
        whole = f"{self._via}/{key}"
        if len(whole) <= _LONGEST_KEY and whole.isprintable():
            return whole
        return f"{self._via}/{sha256(str(key).encode('utf-8', 'surrogatepass')).hexdigest()}"

    def _sealed(self, private: Mapping[str, Any] | None) -> bytes | None:
        if not private:
            return None
        try:
            return self._parts.predictions.seals.seal(private)
        except ValueError as error:
            raise Problem(422, "invalid-request", str(error)) from None
