"""A provider's adapter as a receiver has it, speaking to the provider's emulation over sockets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from receiver.emulator import settings_for
from receiver.model.states import cause_of
from receiver.model.values import Mode, Outcome, Ticket
from receiver.providers import DECLARED
from receiver.providers.adapter import (
    Accepted,
    Callback,
    CallbackTarget,
    Follow,
    Provider,
    ProviderResponse,
    Publishing,
    Receipt,
)
from receiver.settings import Settings
from tests.emulator.serving import Emulated, Mail, eventually

SECRET = "a-secret-of-one-prediction"


@dataclass(frozen=True)
class Adapted:
    """An adapter, and what it is connected to."""

    emulated: Emulated
    name: str
    key: str = "key-1"

    @property
    def settings(self) -> Settings:
        given = {DECLARED[self.name].key: self.key, **settings_for(self.emulated.url)}
        return Settings.read({"RECEIVER_DEV": "1", **given})

    @property
    def provider(self) -> Provider:
        return self.settings.adapters()[self.name]

    def send(self, request: httpx.Request) -> ProviderResponse:
        answer = self.emulated.http.send(request)
        return ProviderResponse(answer.status_code, answer.headers, answer.content)

    def ticket(self, prompt: str, mode: Mode = "queue", **more: Any) -> Ticket:
        given = {"model": DECLARED[self.name].example, "input": {"prompt": prompt}, **more}
        return Ticket(id="pred_1", mode=mode, **given)

    def submit(self, ticket: Ticket, hook: str = "") -> Receipt:
        target = CallbackTarget(hook, SECRET) if hook else None
        return self.provider.accepted(ticket, self.send(self.provider.request(ticket, target)))

    def taken(self, prompt: str, hook: str = "", **more: Any) -> Ticket:
        """Submit, and return the ticket of what was accepted."""
        ticket = self.ticket(prompt, **more)
        receipt = self.submit(ticket, hook)
        assert isinstance(receipt, Accepted), receipt
        named = {"provider_id": receipt.provider_id, "links": receipt.links}
        return msgspec.structs.replace(ticket, **named)

    def ended(self, ticket: Ticket) -> Outcome:
        """Poll until the end."""
        return eventually(lambda: self.polled(ticket), lambda outcome: bool(cause_of(outcome)))

    def polled(self, ticket: Ticket) -> Outcome:
        outcome = self.provider.polled(ticket, self.send(self.provider.poll(ticket)))
        if isinstance(outcome, Follow):
            return outcome.read(ticket, self.send(outcome.request))
        return outcome

    def keys(self) -> Sequence[bytes]:
        """Return what proves its callbacks: set, handed out, or of one prediction."""
        provider, given = self.provider, self.settings.providers[self.name]
        if given.secrets:
            return [secret.reveal().encode() for secret in given.secrets]
        if isinstance(provider, Publishing):
            return provider.read_keys(self.send(provider.keys()).body)
        return [SECRET.encode()]

    def prove(self, mail: Mail, keys: Sequence[bytes] | None = None) -> str | None:
        """Raise Unproved, or return the id that the proof covers."""
        headers = [(name.encode(), value.encode()) for name, value in mail.headers.items()]
        callback = Callback(headers, mail.body, mail.at)
        found = self.keys() if keys is None else keys
        return self.provider.authenticate(callback, now=mail.at, keys=found)

    def key_works(self) -> bool | None:
        return self.provider.key_works(self.send(self.provider.try_key()))
