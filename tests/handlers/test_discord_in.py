"""`discord-in` takes orders in Discord, and answers them even if the interaction token fails."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some

from receiver.emulator import Rule
from receiver.emulator.chats.board import numbered
from receiver.emulator.chats.discord.interactions import EPOCH
from receiver.emulator.chats.discord.people import signed
from receiver.testing import Kit, make_event
from tests.conftest import Disk, Start
from tests.handlers.chat import KEPT, keeping
from tests.handlers.parts import built_in
from tests.handlers.talking import (
    PNG,
    RECIPES,
    Kits,
    accounts,
    call,
    four_times,
    nowhere,
    predictions,
    rejected,
    spoilt,
    talking,
)
from tests.journey.parts import eventually
from tests.receiving import eventually as eventually_there
from tests.receiving import hangs

STAMP: Final = "1700000000"
AT: Final = ((786008729715212338 >> 22) + EPOCH) / 1000
COMMAND: Final = (
    '{"id":"786008729715212338","application_id":"1000000000000000001","type":2,"token":'
    '"A_UNIQUE_TOKEN","version":1,"guild_id":"290926798626357999","channel_id":'
    '"645027906669510667","member":{"user":{"id":"53908232506183680","username":"Mason"},"roles":'
    '["539082325061836999"],"permissions":"2147483647"},"data":{"id":"771825006014889984","name":'
    '"imagine","type":1,"options":[{"type":3,"name":"prompt","value":"a lighthouse ✨"}]}}'
).encode()
BUTTON: Final = (
    b'{"id":"786008729715212340","application_id":"1000000000000000001","type":3,"token":'
    b'"B_UNIQUE_TOKEN","version":1,"channel_id":"645027906669510667","user":{"id":'
    b'"53908232506183680","username":"Mason"},"message":{"id":"786008729715212339"},"data":'
    b'{"component_type":2,"custom_id":"again:tok"}}'
)
VECTORS: Final = {
    b'{"type":1}': (
        "c1098e97d711377f30225d53d94b89d43537f92e5b3afaddc590781b1f9f9d4b"
        "2eeab335d370be3b9a090bc61a85b86448bc140dcd195f1569c2bff181257607"
    ),
    COMMAND: (
        "d5500d02a7d4414fb532b4f64dbcd10e2d63a38b740079378244ae49fdfc96e1"
        "2f6a6c154f34cdfd7868125a0c6c2c01120db2b594b57277df3b590e4564540f"
    ),
    BUTTON: (
        "499eb58e1259afaf4e042208ae5252e9c9be58f8a99068dfd6938963eef0a984"
        "c3e804b50bf0265fe45c2c141462dcc15f322e9d90b63d4c7bd88b4fbfcb970f"
    ),
}


def proof(signature: str, stamp: str = STAMP) -> dict[str, str]:
    kind = {"content-type": "application/json"}
    return kind | {"x-signature-ed25519": signature, "x-signature-timestamp": stamp}


@pytest.fixture
def discord(monkeypatch: pytest.MonkeyPatch) -> str:
    accounts(monkeypatch)
    return built_in("discord_in")


# --- proofs ---


@pytest.mark.anyio
async def test_only_requests_signed_by_discord_are_accepted(start: Start, discord: str) -> None:
    async with start(discord, clock=lambda: AT, others=nowhere(), **RECIPES) as station:
        for body, good in VECTORS.items():
            answer = await call(station, "/in/discord", body, proof(good.upper()))
            assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
            flipped = good[:-1] + ("0" if good[-1] != "0" else "1")
            for bad in (
                proof(flipped),
                proof(good[:-1]),
                proof(good + "0"),
                proof(good, f" {STAMP}"),
                proof(good, "1700000001"),
                proof(f"{good}, {good}"),
                {"x-signature-ed25519": good},
                {"x-signature-timestamp": STAMP},
                {},
            ):
                assert (await call(station, "/in/discord", body, bad)).status_code == 401
            again = await call(station, "/in/discord", body + b"\n", proof(good))
            assert again.status_code == 401
        ping = await call(station, "/in/discord", b'{"type":1}', proof(VECTORS[b'{"type":1}']))
        assert ping.json() == {"type": 1}
        assert station.count("predictions") == 1


@pytest.mark.anyio
async def test_command_with_an_expired_token_is_rejected_as_stale(
    start: Start, discord: str
) -> None:
    async with start(discord, clock=lambda: AT + 1000, others=nowhere(), **RECIPES) as station:
        [(body, good)] = [each for each in VECTORS.items() if b'"type":2' in each[0]]
        assert (await call(station, "/in/discord", body, proof(good))).status_code == 401
        found = await eventually_there(
            lambda: station.http.get("/v1/discarded?kind=rejected"), lambda got: got.json()["data"]
        )
        assert [one["reason"] for one in found.json()["data"]] == ["stale"]


def made_now(kit: Kit, body: bytes) -> bytes:
    """Return an interaction with an id of this moment."""
    stamp = int(kit.clock() * 1000 - EPOCH) << 22
    return json.dumps({**json.loads(body), "id": str(stamp)}).encode()


def test_random_unsigned_requests_get_401_and_signed_ones_order_only_the_command(
    receiver_kit: Kits,
) -> None:
    kit = talking(receiver_kit, "discord_in")
    command, button = made_now(kit, COMMAND), made_now(kit, BUTTON)
    statuses = {command: 200, button: 200, b'{"type":2,"id":"1"}': 401, b'{"type":"2"}': 400}
    bodies = some.binary(max_size=100) | some.sampled_from([*statuses])

    @settings(max_examples=10)
    @given(bodies, some.text("0123456789abcdef ,", max_size=130))
    @example(command, "0" * 128)
    def say_unsigned(body: bytes, noise: str) -> None:
        assert kit.calls("/in/discord", body, proof(noise.strip())).status_code == 401

    @settings(max_examples=10)
    @given(bodies)
    @example(command)
    @example(button)
    def say_signed(body: bytes) -> None:
        answer = kit.calls("/in/discord", body, signed(int(kit.clock()), body))
        assert answer.status_code == statuses.get(body, 400)

    say_unsigned()
    assert predictions(kit) == []
    assert eventually(lambda: set(rejected(kit))) == {"bad_signature"}
    say_signed()
    assert len(predictions(kit)) == 1


@pytest.mark.anyio
async def test_malformed_signed_requests_cause_no_500(start: Start, discord: str) -> None:
    said = [*spoilt(json.loads(COMMAND)), *spoilt(json.loads(BUTTON))]
    async with start(discord, clock=lambda: AT, others=nowhere(), **RECIPES) as station:
        for one in said:
            body = json.dumps(one).encode()
            answer = await call(station, "/in/discord", body, signed(int(AT), body))
            assert answer.status_code < 500, str(one)[:300]


# --- orders ---


def test_picture_replaces_the_acknowledgement(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "discord_in")
    said = kit.says("/imagine a lighthouse", on="discord", finish=False)
    promise = said.reply
    assert (promise.text, [one.label for one in promise.buttons]) == ("On it.", ["Cancel"])
    kit.finish_all()
    assert said.reply is promise
    assert (len(promise.pictures), "a lighthouse" in promise.text) == (1, True)
    assert [one.label for one in promise.buttons] == ["Again", "Larger", "Delete"]
    [prediction] = predictions(kit)
    assert prediction.order
    assert prediction.order.person == f"discord:{numbered('U1')}"
    assert "token" not in json.dumps(prediction.metadata)


def test_rejected_orders_are_visible_to_the_requester_only(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "discord_in")
    [wrong] = kit.says("/nothing a tower", on="discord").messages
    assert (wrong.only_for, "no recipe 'nothing'" in wrong.text) == (str(numbered("U1")), True)
    for number in range(5):
        assert kit.says(f"/imagine {number}", on="discord").replies
    [over] = kit.says("/imagine one more", on="discord").messages
    assert (over.only_for, "5" in over.text) == (str(numbered("U1")), True)
    assert len(predictions(kit)) == 5


# --- duplicates, delays, faults ---


@pytest.mark.anyio
@pytest.mark.both_engines
async def test_duplicate_commands_order_once(start: Start, discord: str) -> None:
    now = [AT]
    async with start(discord, clock=lambda: now[0], others=nowhere(), **RECIPES) as station:
        headers = proof(VECTORS[COMMAND])
        assert await four_times(station, "/in/discord", COMMAND, headers) == [200] * 4
        now[0] += 90_000
        assert await four_times(station, "/in/discord", COMMAND, headers) == [401] * 4
        assert (station.count("predictions"), station.count("orders")) == (1, 1)


@pytest.mark.anyio
@pytest.mark.usefixtures("stops_soon")
async def test_command_gets_503_on_a_full_disk_and_200_while_the_provider_hangs(
    start: Start, network: Any, disk: Disk, discord: str
) -> None:
    network.always("fal.submit", hangs)
    async with start(discord, clock=lambda: AT, others=nowhere(), **RECIPES) as station:
        disk.full = True
        headers = proof(VECTORS[COMMAND])
        assert (await call(station, "/in/discord", COMMAND, headers)).status_code == 503
        disk.full = False
        answer = await call(station, "/in/discord", COMMAND, headers)
        assert answer.json()["data"]["content"] == "On it."
        assert station.count("predictions") == 1


def found_message(kit: Kit) -> None:
    """Wait until the id of the acknowledgement is stored."""
    eventually(lambda: predictions(kit)[0].metadata.get("discord_reply"))


@pytest.mark.parametrize("how", ["16 minutes", "31 minutes", "10015", "50027"])
def test_expired_or_invalid_token_leaves_the_picture_in_the_same_message(
    receiver_kit: Kits, how: str
) -> None:
    kit = talking(receiver_kit, "discord_in")
    said = kit.says("/imagine a lighthouse", on="discord", finish=False)
    found_message(kit)
    if how.endswith("minutes"):
        kit.clock.move(float(how.split(maxsplit=1)[0]) * 60)
    else:
        kit.chats.kill_tokens({"discord": int(how)})
    kit.finish_all()
    assert (len(said.reply.pictures), said.reply.by) == (1, "response")


def test_token_that_never_worked_gives_a_new_message_or_a_direct_one(
    receiver_kit: Kits,
) -> None:
    kit = talking(receiver_kit, "discord_in")
    kit.chats.kill_tokens({"discord": 10015})
    first = kit.says("/imagine a lighthouse", on="discord")
    shown = [one for one in first.replies if one.pictures]
    assert [(one.by, one.place == first.replies[0].place) for one in shown] == [
        ("messages.post", True)
    ]
    kit.chats.discord.closed.add(shown[0].place)
    second = kit.says("/imagine a tower", on="discord")
    [direct] = [one for one in second.replies if one.pictures]
    assert direct.place == kit.chats.place("discord", "D", "U1")


def test_malformed_token_gives_a_new_message(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "discord_in")
    place, person = kit.chats.place("discord", "C1", "U1"), numbered("U1")
    given = json.loads(COMMAND) | {"token": "a b?\0", "channel_id": place}
    given |= {"id": str(int(kit.clock() * 1000 - EPOCH) << 22)}
    given["member"]["user"]["id"] = str(person)
    body = json.dumps(given).encode()
    assert kit.calls("/in/discord", body, signed(int(kit.clock()), body)).status_code == 200
    kit.finish_all()
    [shown] = [one for one in kit.chats.discord.board.messages if one.pictures]
    assert (shown.by, shown.place) == ("messages.post", place)


@pytest.mark.parametrize("fault", ["lose_answer", "drop_call", "fail_call", "limit_call"])
@pytest.mark.parametrize("method", ["webhook.edit", "messages.post"])
def test_picture_appears_once_if_its_post_fails_or_loses_the_answer(
    receiver_kit: Kits, fault: Any, method: str
) -> None:
    kit = talking(receiver_kit, "discord_in")
    if method == "messages.post":
        kit.chats.kill_tokens({"discord": 10015})
    rule = Rule(fault=fault, provider="discord", match=method, times=1)
    kit.chats.scene.faults.replace([rule])
    said = kit.says("/imagine a lighthouse", on="discord", finish=False)
    if method == "webhook.edit":
        found_message(kit)
    kit.finish_all()
    kit.move(3600)
    assert [len(one.pictures) for one in said.replies if one.pictures] == [1]


def test_flagged_picture_is_hidden_as_a_spoiler(receiver_kit: Kits) -> None:
    kit = receiver_kit(keeping, built_in("discord_in"), chats=True, settings=RECIPES)
    reply = kit.says("/imagine a lighthouse", on="discord").reply
    assert [one.name.startswith("SPOILER_") for one in reply.files] == [True]
    assert "image" not in json.dumps(reply.raw["embeds"])
    assert "flagged: all black" in reply.text
    settings = RECIPES | {"DISCORD_MAX_BYTES": "1"}
    kit = receiver_kit(keeping, built_in("discord_in"), chats=True, settings=settings)
    linked = kit.says("/imagine a lighthouse", on="discord").reply
    assert (linked.files, f"||<{KEPT}>||" in linked.text) == ([], True)


@pytest.mark.parametrize("minutes", [0, 16])
def test_failure_is_sent_to_the_requester_and_deletes_the_acknowledgement(
    receiver_kit: Kits, minutes: int
) -> None:
    kit = talking(receiver_kit, "discord_in")
    said = kit.says("/imagine a lighthouse", on="discord", finish=False)
    promise = said.reply
    found_message(kit)
    kit.clock.move(minutes * 60)
    kit.finish_all(make_event("failed", error=("content_policy", "unsafe")))
    [told] = said.messages
    assert (promise.is_deleted, "rules do not allow" in told.text) == (True, True)
    alone = told.only_for or told.place
    place = kit.chats.place("discord", "D", "U1")
    assert alone == (place if minutes else str(numbered("U1")))


# --- pictures and buttons ---


def test_attachment_url_becomes_the_image_option(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "discord_in")
    kit.chats.discord.commands[""] = [
        {
            "name": "imagine",
            "options": [{"name": "prompt", "type": 3}, {"name": "image", "type": 11}],
        }
    ]
    said = kit.says("/imagine like this", on="discord", files={"a.png": PNG})
    assert said.reply.pictures
    [prediction] = predictions(kit)
    assert "/discord/cdn/" in prediction.input["image_url"]


@pytest.mark.parametrize("is_closed", [False, True])
def test_buttons_work_for_others_but_delete_only_for_the_requester(
    receiver_kit: Kits, is_closed: bool
) -> None:
    kit = talking(receiver_kit, "discord_in")
    if is_closed:  # as where the app is installed for the person only
        kit.chats.discord.closed.add(kit.chats.place("discord", "C1", "U1"))
    reply = kit.says("/imagine a lighthouse", on="discord").reply
    larger = kit.presses(reply, "Larger", person="U2", on="discord").reply
    assert [one.label for one in larger.buttons] == ["Again", "Delete"]
    assert kit.presses(reply, "Again", on="discord").reply.pictures
    [first, second, third] = predictions(kit)
    assert second.input == {"image_url": (first.output or [])[0].url}
    assert third.input == first.input
    [refused] = kit.presses(reply, "Delete", person="U2", on="discord").messages
    assert (refused.only_for, reply.is_deleted) == (str(numbered("U2")), False)
    kit.presses(reply, "Delete", on="discord")
    eventually(lambda: reply.is_deleted)


def test_requester_can_cancel(receiver_kit: Kits) -> None:
    kit = talking(receiver_kit, "discord_in")
    said = kit.says("/imagine a lighthouse", on="discord", finish=False)
    kit.presses(said.reply, "Cancel", on="discord", finish=False)
    eventually(lambda: predictions(kit)[0].status, lambda status: status == "canceled")
    kit.finish_all()
    assert [one.text for one in said.messages] == ["Canceled."]
