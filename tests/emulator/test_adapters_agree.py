"""Each adapter works with the emulation of its provider; both follow the same documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import httpx
import msgspec
import pytest

from receiver.emulator import settings_for
from receiver.emulator.options import Shape
from receiver.emulator.providers import CALLING
from receiver.model.errors import Unproved
from receiver.model.values import Mode, Outcome, Ticket
from receiver.providers import DECLARED
from receiver.providers.adapter import (
    Accepted,
    Addressing,
    Callback,
    CallbackTarget,
    Follow,
    Guarding,
    Provider,
    ProviderResponse,
    Publishing,
    Refused,
    Stopping,
)
from receiver.settings import Settings
from tests.emulator.conftest import Start
from tests.emulator.serving import Emulated, Mail, Mailbox, eventually

NAMES: Final = tuple(DECLARED)
SECRET: Final = "of-this-prediction-alone"
SHAPES: Final[tuple[Shape, ...]] = ("new", "old", "mixed")
CODES: Final = {
    "[fail]": "provider_error",
    "[moderated]": "content_policy",
    "[timeout]": "timeout",
}
TELL_NO_FAILURE: Final = frozenset({"ideogram"})
"""Providers that send callbacks only for successes."""
UNDATED: Final = frozenset({"eachlabs", "bfl"})
"""Providers whose callbacks have no signed timestamp."""

of_all = pytest.mark.parametrize("name", NAMES)
of_those_who_call = pytest.mark.parametrize("name", CALLING)


class Talk:
    """One adapter with an emulator that answers its requests."""

    def __init__(self, name: str, emulated: Emulated, key: str = "k") -> None:
        env = {"RECEIVER_DEV": "1", DECLARED[name].key: key, **settings_for(emulated.url)}
        settings = Settings.read(env)
        self.provider: Provider = settings.adapters()[name]
        self._set = settings.providers[name].secrets
        self._http = emulated.http

    def ask(self, request: httpx.Request) -> ProviderResponse:
        answer = self._http.send(request)
        return ProviderResponse(answer.status_code, answer.headers, answer.content)

    def submit(self, prompt: str, hook: str = "", mode: Mode = "queue") -> tuple[Ticket, object]:
        given = {"prompt": prompt}
        model = DECLARED[self.provider.name].example
        ticket = Ticket(id="pred_1", model=model, mode=mode, input=given)
        target = CallbackTarget(hook, SECRET) if hook else None
        if mode == "sync" and isinstance(self.provider, Addressing):
            addressed = self.provider.addressed(ticket, self.ask(self.provider.details(model)))
            assert isinstance(addressed, Ticket)
            ticket = addressed
        receipt = self.provider.accepted(ticket, self.ask(self.provider.request(ticket, target)))
        if isinstance(receipt, Accepted):
            ticket = msgspec.structs.replace(
                ticket, provider_id=receipt.provider_id, links=receipt.links
            )
        return ticket, receipt

    def poll(self, ticket: Ticket) -> Outcome:
        answer = self.ask(self.provider.poll(ticket))
        found = self.provider.polled(ticket, answer)
        if isinstance(found, Follow):
            found = found.read(ticket, self.ask(found.request))
        return found

    def ended(self, ticket: Ticket) -> Outcome:
        return eventually(lambda: self.poll(ticket), lambda found: found.kind != "processing")

    def told(self, mailbox: Mailbox) -> Outcome:
        """Authenticate the next callback, and read it."""
        return self.read(mailbox.one())

    def read(self, mail: Mail, keys: Sequence[bytes] | None = None) -> Outcome:
        headers = [(name.encode(), value.encode()) for name, value in mail.headers.items()]
        callback = Callback(headers, mail.body, mail.at)
        self.provider.authenticate(callback, now=mail.at, keys=keys or self.keys())
        return self.provider.read(mail.body)

    def keys(self) -> list[bytes]:
        """Return the callback secrets: of the settings, of the provider, or of this prediction."""
        if self._set:
            return [secret.reveal().encode() for secret in self._set]
        if isinstance(self.provider, Publishing):
            return self.provider.read_keys(self.ask(self.provider.keys()).body)
        return [SECRET.encode()]


@of_those_who_call
@pytest.mark.parametrize("shape", SHAPES)
def test_callback_and_poll_report_the_same_outcome(
    start: Start, mailbox: Mailbox, name: str, shape: Shape
) -> None:
    talk = Talk(name, start(shape=shape))
    ticket, _ = talk.submit("a lighthouse", mailbox.url)
    told, found = talk.told(mailbox), talk.ended(ticket)
    for outcome in (told, found):
        assert (outcome.kind, outcome.provider_id) == ("succeeded", ticket.provider_id)
        [picture] = outcome.output
        assert str(picture.url).startswith("http://127.0.0.1:")
    assert told.output == found.output


@of_all
def test_output_url_can_be_fetched_with_the_key_it_requires(start: Start, name: str) -> None:
    emulated = start()
    talk = Talk(name, emulated)
    [picture] = talk.ended(talk.submit("a lighthouse")[0]).output
    assert picture.url
    key = talk.provider.authorization(picture.url) if isinstance(talk.provider, Guarding) else None
    for headers in [{"authorization": key} if key else {}, {}]:
        answer = emulated.http.get(picture.url, headers=headers)
        assert answer.status_code == (401 if key and not headers else 200)


@of_all
@pytest.mark.parametrize("prompt", CODES)
def test_failure_has_the_error_code_of_its_cause(
    start: Start, mailbox: Mailbox, name: str, prompt: str
) -> None:
    talk = Talk(name, start())
    ticket, _ = talk.submit(f"x {prompt}", mailbox.url)
    found = talk.ended(ticket)
    assert found.error is not None
    assert (found.kind, found.error.code) == ("failed", CODES[prompt])
    if name in CALLING and name not in TELL_NO_FAILURE:
        told = talk.told(mailbox)
        assert told.error is not None
        assert (told.kind, told.error.code) == ("failed", CODES[prompt])


@of_all
def test_sync_submit_succeeds_with_one_output(start: Start, name: str) -> None:
    talk = Talk(name, start())
    ticket, receipt = talk.submit("a lighthouse", mode="sync")
    outcome = talk.ended(ticket) if isinstance(receipt, Accepted) else receipt
    assert isinstance(outcome, Outcome)
    assert (outcome.kind, len(outcome.output)) == ("succeeded", 1)


@of_all
def test_canceled_prediction_ends_as_canceled_if_the_provider_can(start: Start, name: str) -> None:
    talk = Talk(name, start())
    ticket, _ = talk.submit("[never]")
    assert talk.poll(ticket).kind == "processing"
    if isinstance(talk.provider, Stopping):
        assert talk.ask(talk.provider.cancel(ticket)).status < 300
        assert talk.ended(ticket).kind == "canceled"


@of_all
def test_rejected_submit_is_read_as_refused(start: Start, name: str) -> None:
    _, receipt = Talk(name, start()).submit("[refuse]")
    assert isinstance(receipt, Refused)


@of_all
def test_poll_of_an_unknown_id_is_missing(start: Start, name: str) -> None:
    talk = Talk(name, start())
    model = DECLARED[name].example
    ticket = Ticket(id="pred_1", model=model, mode="queue", input={}, provider_id="nobodys")
    assert talk.poll(ticket).kind == "missing"


@of_all
def test_key_check_accepts_a_valid_key_and_rejects_an_invalid_one(start: Start, name: str) -> None:
    emulated = start(api_keys=frozenset({"good"}))
    for key, works in (("good", True), ("bad", False)):
        talk = Talk(name, emulated, key)
        assert talk.provider.key_works(talk.ask(talk.provider.try_key())) is works


@of_those_who_call
def test_forged_callback_is_rejected(start: Start, mailbox: Mailbox, name: str) -> None:
    emulated = start()
    emulated.break_with({"fault": "wrong_signature"})
    talk = Talk(name, emulated)
    talk.submit("a lighthouse", mailbox.url)
    with pytest.raises(Unproved):
        talk.told(mailbox)


@pytest.mark.parametrize("name", [each for each in CALLING if each not in UNDATED])
def test_callback_with_an_old_timestamp_is_rejected(
    start: Start, mailbox: Mailbox, name: str
) -> None:
    emulated = start()
    emulated.break_with({"fault": "stale_timestamp"})
    talk = Talk(name, emulated)
    talk.submit("a lighthouse", mailbox.url)
    with pytest.raises(Unproved, match=r"^stale_timestamp$"):
        talk.told(mailbox)
