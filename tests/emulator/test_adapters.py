"""Every adapter against the emulation of its provider: written apart, they must agree.

A new provider joins by its line in `receiver.emulator.providers`.
"""

import pytest

from receiver.emulator.options import Shape
from receiver.emulator.providers import CALLING
from receiver.model.errors import Unproved, Unreadable
from receiver.model.values import Outcome, Ticket
from receiver.providers import DECLARED
from receiver.providers.adapter import Guarding, Postponed, Publishing, Refused
from tests.emulator.adapting import Adapted
from tests.emulator.conftest import Start
from tests.emulator.serving import Mailbox, eventually
from tests.providers.samples import providers

PROVIDERS = {name: provider for name, provider in providers().items() if name in CALLING}
TICKET = Ticket(id="pred_1", model="o/m", mode="queue", input={}, provider_id="1")
DATED = [name for name, each in PROVIDERS.items() if each.proof != "prediction_secret"]
HANDING = [name for name, each in PROVIDERS.items() if isinstance(each, Publishing)]
STOPPING = [name for name, each in PROVIDERS.items() if each.cancel(TICKET)]

of_all = pytest.mark.parametrize("name", PROVIDERS)
of_shapes = pytest.mark.parametrize("shape", ["new", "old", "mixed"])


@of_all
@of_shapes
def test_a_callback_is_proved_and_says_what_a_poll_says(
    start: Start, mailbox: Mailbox, name: str, shape: Shape
) -> None:
    adapted = Adapted(start(shape=shape, seed=7), name)
    ticket = adapted.taken("a lighthouse", mailbox.url)
    mail = mailbox.one()
    assert adapted.prove(mail) in {None, ticket.provider_id}
    told, polled = adapted.provider.read(mail.body), adapted.ended(ticket)
    assert told.kind == polled.kind == "succeeded"
    assert ticket.provider_id in {told.provider_id, told.also_known_as}
    assert [each.url for each in told.output] == [each.url for each in polled.output]
    assert all(each.url for each in told.output)
    assert told.output


@of_all
def test_a_result_can_be_fetched_where_it_is_said_to_be(start: Start, name: str) -> None:
    adapted = Adapted(start(), name)
    for output in adapted.ended(adapted.taken("a lighthouse")).output:
        assert output.url
        guard = adapted.provider if isinstance(adapted.provider, Guarding) else None
        given = guard.authorization(output.url) if guard else None
        headers = {"authorization": given} if given else {}
        answer = adapted.emulated.http.get(output.url, headers=headers)
        assert answer.headers["content-type"] == "image/png"
        assert adapted.emulated.http.get(output.url).is_success == (given is None)


@of_all
@of_shapes
@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("[fail]", "provider_error"),
        ("[moderated]", "content_policy"),
        ("[timeout]", "timeout"),
    ],
)
def test_a_failure_has_its_code(
    start: Start, name: str, shape: Shape, prompt: str, code: str
) -> None:
    adapted = Adapted(start(shape=shape, seed=7), name)
    outcome = adapted.ended(adapted.taken(prompt))
    assert (outcome.kind, outcome.error and outcome.error.code) == ("failed", code)


@of_all
def test_a_forged_callback_is_not_proved(start: Start, mailbox: Mailbox, name: str) -> None:
    adapted = Adapted(start(), name)
    adapted.taken("a lighthouse [wrong_signature]", mailbox.url)
    with pytest.raises(Unproved, match=r"^bad_s"):
        adapted.prove(mailbox.one())


@pytest.mark.parametrize("name", DATED)
def test_an_old_callback_is_not_proved(start: Start, mailbox: Mailbox, name: str) -> None:
    adapted = Adapted(start(), name)
    adapted.taken("a lighthouse [stale_timestamp]", mailbox.url)
    with pytest.raises(Unproved, match=r"^stale_timestamp$"):
        adapted.prove(mailbox.one())


@pytest.mark.parametrize("name", HANDING)
def test_a_callback_under_new_keys_wants_them_fetched_again(
    start: Start, mailbox: Mailbox, name: str
) -> None:
    adapted = Adapted(start(), name)
    before = adapted.keys()
    adapted.emulated.break_with({"fault": "rotate_keys"})
    adapted.taken("a lighthouse", mailbox.url)
    mail = mailbox.one()
    with pytest.raises(Unproved, match=r"^bad_signature$"):
        adapted.prove(mail, before)
    adapted.prove(mail)


@of_all
@of_shapes
def test_a_refusal_is_told_from_a_delay(start: Start, name: str, shape: Shape) -> None:
    adapted = Adapted(start(shape=shape, seed=7), name)
    assert isinstance(adapted.submit(adapted.ticket("[refuse]")), Refused)
    owner, slash, _ = DECLARED[name].example.partition("/")
    model = f"{owner}/no-such-model" if slash else "no-such-model"
    assert isinstance(adapted.submit(adapted.ticket("a lighthouse", model=model)), Refused)
    adapted.emulated.break_with({"fault": "refuse_submit", "status": 429, "retry_after": 7})
    postponed = adapted.submit(adapted.ticket("a lighthouse"))
    assert isinstance(postponed, Postponed)
    assert (postponed.after, postponed.whole_provider) == (7.0, True)


@of_all
@of_shapes
def test_a_blocking_call_is_answered_with_its_end(start: Start, name: str, shape: Shape) -> None:
    adapted = Adapted(start(shape=shape, seed=7), name)
    outcome = adapted.submit(adapted.ticket("a lighthouse", "sync"))
    assert isinstance(outcome, Outcome)
    assert outcome.kind == "succeeded"
    assert all(output.url for output in outcome.output)
    assert outcome.output
    failed = adapted.submit(adapted.ticket("[moderated]", "sync"))
    assert isinstance(failed, Outcome | Refused)
    code = failed.code if isinstance(failed, Refused) else failed.error and failed.error.code
    assert code == "content_policy"


@of_all
def test_what_is_not_known_is_missing_and_a_broken_poll_is_unreadable(
    start: Start, name: str
) -> None:
    adapted = Adapted(start(), name)
    unknown = adapted.ticket("a lighthouse", provider_id="00000000-0000-0000-0000-000000000000")
    assert adapted.polled(unknown).kind == "missing"
    ticket = adapted.taken("a lighthouse")
    for answer in ("error", "garbage"):
        adapted.emulated.break_with({"fault": "break_poll", "times": 1, "answer": answer})
        with pytest.raises(Unreadable):
            adapted.polled(ticket)
    assert adapted.ended(ticket).kind == "succeeded"


@of_all
def test_a_key_is_told_good_from_bad(start: Start, name: str) -> None:
    emulated = start(api_keys=frozenset({"key-1"}))
    assert Adapted(emulated, name).key_works() is True
    stranger = Adapted(emulated, name, key="key-2")
    assert stranger.key_works() is False
    assert isinstance(stranger.submit(stranger.ticket("a lighthouse")), Refused)


@pytest.mark.parametrize("name", STOPPING)
def test_what_can_be_cancelled_is(start: Start, name: str) -> None:
    adapted = Adapted(start(), name)
    ticket = adapted.taken("[never]")
    stop = adapted.provider.cancel(ticket)
    assert stop
    adapted.send(stop)
    assert adapted.ended(ticket).kind == "canceled"


@of_all
def test_all_that_runs_is_seen_to_run(start: Start, name: str) -> None:
    adapted = Adapted(start(generation=0.05), name)
    ticket = adapted.taken("[never]")
    eventually(
        lambda: (adapted.polled(ticket).kind, adapted.emulated.row(ticket.provider_id or "")),
        lambda seen: seen[0] == "processing" and seen[1]["status"] == "running",
    )
