"""The emulated Discord works with discord.py, and signs the requests that it sends."""

from __future__ import annotations

import asyncio
import io
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import httpx
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from starlette.responses import Response

from receiver.emulator import Rule
from receiver.emulator.chats.board import numbered
from receiver.emulator.chats.discord.api import PUBLIC_KEY, TOKEN
from receiver.emulator.chats.discord.interactions import APPLICATION
from receiver.emulator.chats.discord.people import DiscordPeople, signed
from receiver.emulator.pictures import draw, name_for
from tests.emulator.chatting import Inside, Outside, Told, outside, said

with warnings.catch_warnings():
    # discord.py imports audioop, for voice, which Python 3.11 reports as deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    import discord
    from discord.http import HTTPClient, Route, handle_message_parameters
    from discord.webhook.async_ import AsyncWebhookAdapter

pytestmark = pytest.mark.anyio

PNG = draw(name_for("a lighthouse")) or b""
DEFERRED, PRIVATE = said({"type": 5}), said({"type": 5, "data": {"flags": 64}})
C1 = str(numbered("C1"))
BOT = {"authorization": f"Bot {TOKEN}", "user-agent": "DiscordBot (https://x.example, 1)"}
API = "https://chats.test/discord/api/v10"
ROW = [{"type": 1, "components": [{"type": 2, "style": 1, "label": "Again", "custom_id": "a:t"}]}]
COMMAND = {
    "name": "imagine",
    "description": "a picture",
    "options": [
        {"type": 3, "name": "prompt", "description": "what", "required": True},
        {"type": 3, "name": "ratio", "description": "how wide"},
        {"type": 4, "name": "count", "description": "how many"},
        {"type": 11, "name": "picture", "description": "to begin with"},
    ],
}


@pytest.fixture(scope="module")
def platform() -> Iterator[Outside]:
    with outside(DEFERRED) as found:
        yield found


@pytest.fixture
def here(platform: Outside, monkeypatch: pytest.MonkeyPatch) -> Outside:
    monkeypatch.setattr(Route, "BASE", f"{platform.url}/discord/api/v10")
    platform.chats.discord.board.messages.clear()
    platform.app.told.clear()
    platform.app.answers[:] = [DEFERRED]
    return platform


@asynccontextmanager
async def bot() -> AsyncIterator[HTTPClient]:
    client = HTTPClient(asyncio.get_running_loop())
    try:
        await client.static_login(TOKEN)
        yield client
    finally:
        await client.close()


def people(inside: Inside) -> DiscordPeople:
    found = inside.chats.people["discord"]
    assert isinstance(found, DiscordPeople)
    return found


def verify(told: Told) -> None:
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(PUBLIC_KEY))
    proof = bytes.fromhex(told.headers["x-signature-ed25519"])
    key.verify(proof, told.headers["x-signature-timestamp"].encode() + told.body)


def token_of(told: Told) -> str:
    return str(told.json["token"])


def test_signature_matches_the_known_vector() -> None:
    assert PUBLIC_KEY == "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
    proof = signed(1_700_000_000, b'{"type":1}')["x-signature-ed25519"]
    assert proof.startswith("c1098e97d711377f30225d53d94b89d43537f92e5b3afaddc590781b1f9f9d4b")


async def test_discord_py_edits_a_deferred_response_and_sends_a_follow_up(here: Outside) -> None:
    await asyncio.to_thread(here.say, "discord", "/imagine a lighthouse")
    token = token_of(here.app.one())
    adapter: Any = AsyncWebhookAdapter()  # type: ignore[no-untyped-call] # it has no types
    board = here.chats.discord.board
    assert [message.is_waiting for message in board.shown(C1)] == [True]
    async with aiohttp.ClientSession() as session:
        file = discord.File(io.BytesIO(PNG), "a.png")
        with handle_message_parameters(content="done", attachments=[file]) as params:
            edited: Any = await adapter.edit_original_interaction_response(
                int(APPLICATION),
                token,
                session=session,
                payload=params.payload,
                multipart=params.multipart,
                files=params.files,
            )
        [message] = board.shown(C1)
        assert (message.id, message.text, message.is_waiting) == (edited["id"], "done", False)
        assert [picture.content for picture in message.pictures] == [PNG]
        hook = discord.Webhook.partial(int(APPLICATION), token, session=session)
        more = await hook.send("and more", wait=True)
        assert [m.text for m in board.shown(C1)] == ["done", "and more"]
        await hook.delete_message(more.id)
        await adapter.delete_original_interaction_response(int(APPLICATION), token, session=session)
    assert board.shown(C1) == []


async def test_expired_revoked_or_unknown_interaction_token_is_rejected(here: Outside) -> None:
    await asyncio.to_thread(here.say, "discord", "/imagine a lighthouse")
    token = token_of(here.app.one())
    async with aiohttp.ClientSession() as session:
        hook = discord.Webhook.partial(int(APPLICATION), token, session=session)
        await asyncio.to_thread(here.do, "POST", "/clock", {"seconds": 16 * 60})
        with pytest.raises(discord.HTTPException) as old:
            await hook.send("late")
        assert (old.value.status, old.value.code) == (401, 50027)
        await asyncio.to_thread(here.do, "POST", "/clock", {"seconds": -16 * 60})
        await asyncio.to_thread(here.do, "PUT", "/tokens", {"discord": 10015})
        with pytest.raises(discord.NotFound) as gone:
            await hook.send("dead")
        assert gone.value.code == 10015
        await asyncio.to_thread(here.do, "PUT", "/tokens", {})
        await hook.send("alive")
        other = discord.Webhook.partial(int(APPLICATION), "nobodys", session=session)
        with pytest.raises(discord.NotFound):
            await other.send("a")
    assert [message.text for message in here.chats.discord.board.shown(C1)] == ["alive"]


async def test_discord_py_registers_commands_and_posts_messages_as_the_bot(here: Outside) -> None:
    board = here.chats.discord.board
    async with bot() as client:
        made: Any = await client.bulk_upsert_global_commands(APPLICATION, [COMMAND])
        assert [command["name"] for command in made] == ["imagine"]
        with handle_message_parameters(content="hello", nonce="n1") as params:
            posted: Any = await client.send_message(C1, params=params)
        with handle_message_parameters(content="better") as params:
            await client.edit_message(C1, posted["id"], params=params)
        opened: Any = await client.start_private_message(numbered("U1"))
        with handle_message_parameters(content="psst") as params:
            await client.send_message(opened["id"], params=params)
        with pytest.raises(discord.HTTPException) as refused:
            await client.bulk_upsert_global_commands(APPLICATION, [{**COMMAND, "name": "Big"}])
        assert refused.value.code == 50035
    assert [(m.text, m.edits) for m in board.shown()] == [("better", 1), ("psst", 0)]
    await asyncio.to_thread(here.say, "discord", "/imagine a b --ratio 16:9 count:2", place="D")
    told = here.app.one()
    verify(told)
    assert (told.json["user"]["id"], "member" in told.json) == (str(numbered("U1")), False)
    assert {o["name"]: o["value"] for o in told.json["data"]["options"]} == {
        "prompt": "a b",
        "ratio": "16:9",
        "count": 2,
    }
    here.chats.discord.commands.clear()


async def test_invalid_token_missing_user_agent_and_rate_limit_are_rejected() -> None:
    inside = Inside()
    where = f"{API}/channels/{C1}/messages"
    stranger = await inside.http.post(
        where, json={"content": "a"}, headers={**BOT, "authorization": "Bot x"}
    )
    assert (stranger.status_code, stranger.json()["code"]) == (401, 0)
    nameless = await inside.http.post(
        where, json={"content": "a"}, headers={"authorization": BOT["authorization"]}
    )
    assert nameless.status_code == 403
    inside.chats.scene.faults.replace([Rule(fault="limit_call", times=1, retry_after=7)])
    limited = await inside.http.post(where, json={"content": "a"}, headers=BOT)
    assert (limited.status_code, limited.json()["retry_after"]) == (429, 7)
    posted = await inside.http.post(where, json={"content": "a"}, headers=BOT)
    assert posted.headers["x-ratelimit-bucket"] == "emulated"
    assert [m.text for m in inside.chats.discord.board.shown()] == ["a"]


BODIES: dict[str, tuple[dict[str, Any], int]] = {
    "empty": ({}, 50006),
    "long": ({"content": "a" * 2001}, 50035),
    "embeds": ({"embeds": [{"title": "a"}] * 11}, 50035),
    "title": ({"embeds": [{"title": "a" * 257}]}, 50035),
    "label": (
        {
            "content": "a",
            "components": [
                {
                    "type": 1,
                    "components": [{"type": 2, "style": 1, "label": "a" * 81, "custom_id": "a"}],
                }
            ],
        },
        50035,
    ),
    "custom_id": (
        {
            "content": "a",
            "components": [
                {
                    "type": 1,
                    "components": [{"type": 2, "style": 1, "label": "a", "custom_id": "a" * 101}],
                }
            ],
        },
        50035,
    ),
    "twice": ({"content": "a", "components": [*ROW, *ROW]}, 50035),
    "shape": ({"content": "a", "embeds": [{"title": "a"}], "flags": 0, "attachments": 5}, 50035),
    "reply": ({"content": "a", "message_reference": {"message_id": "1"}}, 50035),
}


@pytest.mark.parametrize("case", BODIES)
async def test_invalid_message_returns_the_documented_error_code(case: str) -> None:
    inside, (body, code) = Inside(), BODIES[case]
    answer = await inside.http.post(f"{API}/channels/{C1}/messages", json=body, headers=BOT)
    assert (answer.status_code, answer.json()["code"]) == (400, code)
    assert inside.chats.discord.board.messages == []


async def test_refused_edit_leaves_the_message_as_it_was() -> None:
    inside = Inside()
    where = f"{API}/channels/{C1}/messages"
    posted = (await inside.http.post(where, json={"content": "a"}, headers=BOT)).json()
    at = f"{where}/{posted['id']}"
    refused = await inside.http.patch(at, json={"content": "a" * 2001}, headers=BOT)
    assert refused.status_code == 400
    edited = await inside.http.patch(at, json={"embeds": [{"title": "b"}]}, headers=BOT)
    assert (edited.json()["content"], edited.json()["embeds"]) == ("a", [{"title": "b"}])


async def test_repeated_enforced_nonce_creates_one_message() -> None:
    inside = Inside()
    body = {"content": "a", "nonce": "n", "enforce_nonce": True}
    answers = [
        await inside.http.post(f"{API}/channels/{C1}/messages", json=body, headers=BOT)
        for _ in range(2)
    ]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(inside.chats.discord.board.messages) == 1


async def test_edit_keeps_only_listed_attachments_and_file_urls_expire() -> None:
    inside = Inside(DEFERRED)
    await people(inside).says("/imagine a", "U1", "C1")
    at = f"{API}/webhooks/{APPLICATION}/{token_of(inside.app.one())}/messages/@original"
    files = {"files[0]": ("a.png", PNG), "files[1]": ("b.png", PNG)}
    first = await inside.http.patch(at, data={"payload_json": "{}"}, files=files)
    [one, two] = first.json()["attachments"]
    assert (await inside.http.get(two["url"])).content == PNG
    await inside.http.patch(at, json={"content": "b"})
    [message] = inside.chats.discord.board.shown()
    assert len(message.files) == 2
    await inside.http.patch(at, json={"attachments": [{"id": one["id"]}]})
    assert [file.name for file in message.files] == ["a.png"]
    inside.chats.scene.move(90_000)
    assert (await inside.http.get(one["url"])).status_code == 404


async def test_ephemeral_response_is_seen_by_one_user_and_not_editable_by_the_bot() -> None:
    inside = Inside(PRIVATE)
    await people(inside).says("/imagine a", "U1", "C1")
    board, asker = inside.chats.discord.board, str(numbered("U1"))
    [message] = board.shown(C1, asker)
    assert (message.only_for, board.shown(C1, "1")) == (asker, [])
    at = f"{API}/channels/{C1}/messages/{message.id}"
    assert (await inside.http.patch(at, json={"content": "a"}, headers=BOT)).json()["code"] == 10008


async def test_button_press_contains_its_message_and_may_edit_it() -> None:
    inside = Inside(said({"type": 4, "data": {"content": "done", "components": ROW}}))
    await people(inside).says("/imagine a", "U1", "C1", files=(("a.png", PNG),))
    [message] = inside.chats.discord.board.shown(C1)
    inside.app.answers[:] = [said({"type": 7, "data": {"content": "again", "components": []}})]
    await people(inside).presses(message, message.buttons[0], "U2")
    pressed = inside.app.told[-1].json
    assert (pressed["type"], pressed["data"]["custom_id"]) == (3, "a:t")
    assert pressed["message"]["id"] == message.id
    assert (message.text, message.buttons, message.edits) == ("again", [], 1)


async def test_interaction_can_be_answered_once_by_the_callback_route() -> None:
    inside = Inside()

    async def calls_back(scope: Any, receive: Any, send: Any) -> None:
        told = httpx.Response(200, content=(await receive())["body"]).json()
        at = f"{API}/interactions/{told['id']}/{told['token']}/callback"
        for status in (200, 400):
            answer = await inside.http.post(at, params={"with_response": "true"}, json={"type": 5})
            assert answer.status_code == status
        await Response(status_code=202)(scope, receive, send)

    inside.transport.calls(httpx.AsyncClient(transport=httpx.ASGITransport(calls_back)))
    await people(inside).says("/imagine a", "U1", "C1")
    assert [m.is_waiting for m in inside.chats.discord.board.shown(C1)] == [True]


async def test_failed_or_malformed_response_is_shown_to_the_user() -> None:
    inside = Inside(Response(status_code=500), Response(b"{", media_type="application/json"))
    for _ in range(2):
        await people(inside).says("/imagine a", "U1", "C1")
    shown = inside.chats.discord.board.shown(C1, str(numbered("U1")))
    assert [message.text for message in shown] == ["The application did not respond"] * 2


async def test_endpoint_is_accepted_only_if_it_rejects_invalid_signatures() -> None:
    careless = Inside(said({"type": 1}))
    assert not await people(careless).sets_up()

    def judge(told: Told) -> Response:
        try:
            verify(told)
        except InvalidSignature:
            return Response(status_code=401)
        return said({"type": 1})

    careless.app.judge = judge
    assert await people(careless).sets_up()
