"""Proofs of callbacks: configured or fetched secrets, the path alone, and invalid proofs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import msgspec
import pytest

from receiver.emulator import Rule
from receiver.model.errors import Unproved
from receiver.providers import DECLARED
from receiver.providers.adapter import Callback, Proof, Provider
from receiver.providers.declared import Declared, Given
from receiver.providers.eachlabs import Eachlabs
from tests.conftest import Logged, Start
from tests.receiving import CallbackRequest, Network, eventually, reply, write

pytestmark = pytest.mark.anyio

ROTATED = Rule(fault="rotate_keys")


class ByPath(Eachlabs):
    """Signs nothing: the secret path is the only proof."""

    proof: ClassVar[Proof] = "capability"

    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> None:
        """Accept every callback."""


class BySecret(Eachlabs):
    """Signs with a secret of the account that its API does not return."""

    proof: ClassVar[Proof] = "account_secret"

    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> None:  # noqa: ARG002 - the signature has no time
        if callback.header(b"x-signature") not in keys:
            raise Unproved("bad_signature")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Register another adapter for Eachlabs."""

    def register(made: type[Eachlabs], **more: Any) -> None:
        def make(given: Given) -> Provider:
            return made(given.api(), None)

        declared = msgspec.structs.replace(DECLARED["eachlabs"], make=make, **more)
        monkeypatch.setitem(cast("dict[str, Declared]", DECLARED), "eachlabs", declared)

    return register


async def test_callback_proved_only_by_its_path_is_confirmed_by_a_poll(
    start: Start, network: Network, registered: Callable[..., None]
) -> None:
    registered(ByPath)
    async with start() as station:
        sent = await station.submitted("eachlabs")
        body = json.dumps({"exec_id": sent.id, "status": "failed", "error": "says a stranger"})
        callback = CallbackRequest(sent.path, [], body.encode())
        assert (await station.post(callback)).status_code == 200
        await eventually(lambda: network.count("eachlabs.poll") == 1)
        assert (await station.read(sent.prediction_id))["status"] == "processing"
        network.always("eachlabs.poll", network.ends)
        assert (await station.post(callback)).status_code == 200
        found = await station.until(sent.prediction_id, "succeeded")
        assert found["channel"] == "poll"


async def test_callback_url_is_sent_only_if_the_signing_secret_is_configured(
    start: Start, network: Network, registered: Callable[..., None], logged: Logged
) -> None:
    registered(BySecret, secret="EACHLABS_SIGNING_SECRET")
    async with start() as station:
        assert (await station.submitted("eachlabs", "none is set")).hook == ""
    [warned] = [each["problem"] for each in logged if "SIGNING" in str(each.get("problem"))]
    assert warned == (
        "EACHLABS_SIGNING_SECRET is not set: outcomes of eachlabs come by poll only, no callbacks"
    )
    async with start(EACHLABS_SIGNING_SECRET="newer, older") as station:
        sent = await station.submitted("eachlabs", "two are set")
        body = network.emulator.callback(sent.prediction)
        for secret, status in (("other", 401), ("older", 200)):
            callback = CallbackRequest(sent.path, [("x-signature", secret)], body)
            assert (await station.post(callback)).status_code == status, secret


async def test_configured_signing_secret_is_not_fetched(start: Start, network: Network) -> None:
    async with start() as station:
        sent = await station.submitted("replicate")
        old = await network.account_secret("replicate")
        network.emulator.faults.replace([ROTATED])
        new = await network.account_secret("replicate")
        assert old != new
    fetched = network.count("replicate.keys")
    async with start(REPLICATE_WEBHOOK_SIGNING_SECRET=f"{new},{old}") as station:
        assert (await station.push(sent)).json() == {"status": "accepted"}
        again = await station.submitted("replicate", "another")
        network.emulator.faults.replace([ROTATED])
        assert (await station.push(again)).status_code == 401
    assert network.count("replicate.keys") == fetched


async def test_callback_signed_for_another_prediction_returns_401(
    start: Start, network: Network
) -> None:
    async with start() as station:
        ours = await station.submitted("replicate", "ours")
        other = await station.submitted("replicate", "another's")
        callback = write(network, other)
        callback.path = ours.path  # signed by Replicate, but sent to the path of another prediction
        assert (await station.post(callback)).status_code == 401
        assert (await station.read(ours.prediction_id))["status"] == "processing"


async def test_ambiguous_replicate_submit_is_found_by_its_token(
    start: Start, network: Network
) -> None:
    async with start(RECEIVER_POLL_AFTER="0.02") as station:
        twin = await station.submit("replicate", "a twin")
        network.emulator.faults.replace([Rule(fault="stall_submit", times=1)])
        found = await station.submit("replicate", "a twin")
        found = await station.until(found["id"], "processing")
        assert network.count("replicate.list")  # so the submit itself was not answered
        assert found["provider_id"] not in {None, twin["provider_id"]}
        network.always("replicate.poll", network.ends)
        await station.until(found["id"], "succeeded")
    assert network.count("replicate.submit") == 2


async def test_replicate_429_waits_as_long_as_its_message_says(
    start: Start, network: Network
) -> None:
    detail = "Request was throttled. Your rate limit resets in ~30s."
    network.script("replicate.submit", reply({"detail": detail}, 429))
    async with start() as station:
        began = station.clock()
        found = await station.submit("replicate")
        assert found["status"] == "queued"
        due_at = station.one("SELECT due_at FROM predictions")
        assert began + 30 <= due_at <= station.clock() + 30
