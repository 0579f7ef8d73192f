"""Take orders in Discord: slash commands and buttons, as HTTP interactions; answer them there.

Use: `DISCORD_PUBLIC_KEY=… DISCORD_APPLICATION=… DISCORD_TOKEN=… receiver serve save discord-in`,
with recipes. `receiver chat discord` registers them as commands; the application's Interactions
Endpoint URL is `/in/discord`.

An order is stored before Discord is answered. Its pictures replace the first answer with the
interaction's token, which is valid for 15 minutes or sometimes not at all; else as the bot, in the
same message or a new one; else in a direct message. Only the person who ordered sees failures. An
edit may safely be repeated, and Discord detects a bot's repeats for some minutes, so no picture is
posted twice; the text of a failure may be.
"""

import asyncio
import logging
import re
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from receiver import (
    Call,
    Context,
    Dead,
    Door,
    Event,
    Output,
    Prediction,
    Problem,
    Reply,
    Template,
    Unproved,
    on,
    read_settings,
    route,
)

from . import _chat as chat
from ._discord import (
    AGENT,
    ID,
    LONGEST_CONTENT,
    Data,
    Interaction,
    Message,
    Option,
    Results,
    check,
    fetch_results,
    once,
    post_all,
    rows,
    send,
    shortened,
)

EPOCH = 1_420_070_400_000  # milliseconds: the time that ids of Discord count from
LIVES = 900  # seconds in which an interaction can be answered
LOOKS = (0.5, 2, 5)  # seconds before each try to read the first answer, once it is a message
ALONE = 64  # the flag of a message that only the person sees
PING, COMMAND, BUTTON = 1, 2, 3
MESSAGE, UNCHANGED = 4, 6
PICTURE = 11
MAY_CANCEL = 0x8 | 0x20 | 0x2000  # administrators, and managers of the server or its messages
CDN = {"cdn.discordapp.com", "media.discordapp.net"}
WORDS = Template("{prompt:.1000}\n{text:.1500}")


def key(text: str) -> Ed25519PublicKey:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text, re.ASCII):
        raise ValueError("must be the application's public key, 64 hex digits")
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(text))


with read_settings() as read:
    PUBLIC_KEY = read.parsed("DISCORD_PUBLIC_KEY", "the application's public key", key)
    APPLICATION = read.matching("DISCORD_APPLICATION", "the application's id, digits", ID)
    TOKEN = read.secret(
        "DISCORD_TOKEN",
        "a bot's token; it may view channels, send messages, embed links and attach files",
        r"[\w.-]+",
    )
    MOST_BYTES = read.size(
        "DISCORD_MAX_BYTES", "the largest result to post; larger ones are linked", default="10MiB"
    )
    URL = read.url(
        "DISCORD_URL", "where the API is", default="https://discord.com/api/v10", secure=True
    )

BOT = AGENT | {"authorization": f"Bot {TOKEN.reveal()}"}
logging.getLogger("httpx").setLevel(logging.WARNING)  # else it logs interactions' tokens


def prove(call: Call) -> None:
    stamp, given = call.header("x-signature-timestamp"), call.header("x-signature-ed25519")
    if not re.fullmatch(r"[0-9a-fA-F]{128}", given) or not re.fullmatch(r"[!-~]{1,40}", stamp):
        raise Unproved("bad_signature")
    try:
        PUBLIC_KEY.verify(bytes.fromhex(given), stamp.encode() + call.body)
    except InvalidSignature:
        raise Unproved("bad_signature") from None
    try:
        asked = msgspec.json.decode(call.body, type=Interaction)
    except msgspec.MsgspecError:
        return  # the route answers what is wrong with the body
    if asked.type != PING and call.at - ((int(asked.id) >> 22) + EPOCH) / 1000 > LIVES:
        raise Unproved("stale")


@route("discord", proof=prove)
async def discord(call: Call, door: Door) -> Reply:
    given = call.json(Interaction)
    if given.type == PING:
        return Reply.json({"type": PING})
    try:
        if given.type == COMMAND:
            return await on_command(given, door)
        if given.type == BUTTON:
            return await on_button(given, door)
    except Problem as problem:
        if problem.type == "invalid-body":
            raise
        return ephemeral(chat.refusal_text(problem))
    return ephemeral("This is not known here.")


def ephemeral(text: str) -> Reply:
    """Return an answer that only the person sees."""
    return Reply.json({"type": MESSAGE, "data": text_message(text) | {"flags": ALONE}})


def text_message(text: str, buttons: dict[str, str] | None = None) -> dict[str, Any]:
    message = {"content": shortened(text, LONGEST_CONTENT), "allowed_mentions": {"parse": []}}
    return message | ({"components": rows(buttons)} if buttons else {})


def who_of(given: Interaction) -> chat.Who:
    user = given.member.user if given.member else given.user
    if user is None or given.channel_id is None:
        raise Problem(400, "invalid-body", "the body names nobody, or no channel")
    rights = given.member.permissions if given.member else "0"
    is_admin = rights.isdecimal() and len(rights) < 30 and bool(int(rights) & MAY_CANCEL)  # noqa: PLR2004 - digits
    place = f"discord:{given.guild_id or 'dm'}/{given.channel_id}"
    return chat.Who(f"discord:{user.id}", place, is_admin, is_direct=given.guild_id is None)


def extras(given: Interaction, door: Door, recipe: str) -> dict[str, Any]:
    """Return the metadata and private values that the later answer needs."""
    private = {
        "token": given.token,
        "labels": chat.labels(door, recipe),
        "most_bytes": given.attachment_size_limit,
    }
    metadata = {"answered_by": "discord-in", "discord_channel": given.channel_id}
    return {"metadata": metadata, "private": private}


async def on_command(given: Interaction, door: Door) -> Reply:
    who, data = who_of(given), given.data
    if data.name == "help":
        return ephemeral(door.command("help").help)
    options = {
        option.name: attachment_url(data, option) if option.type == PICTURE else option.value
        for option in data.options
    }
    prediction = await door.order(
        data.name,
        options,
        key=given.id,
        person=who.person,
        place=who.place,
        **extras(given, door, data.name),
    )
    return await acknowledge(given, door, prediction)


def attachment_url(data: Data, option: Option) -> str:
    """Return the URL of an attachment, which needs no key and is valid for a day."""
    file = data.resolved.attachments.get(str(option.value))
    parts = urlsplit(file.url if file else "")
    ours = urlsplit(URL)
    is_theirs = parts.scheme == "https" and parts.hostname in CDN
    if file is None or not (is_theirs or parts.netloc == ours.netloc):
        raise Problem(422, "bad-option", f"{option.name} is not an attachment")
    return file.url


async def on_button(given: Interaction, door: Door) -> Reply:
    press = chat.read_press(door, given.data.custom_id)
    prediction = await chat.act(door, press, who_of(given), given.id, partial(extras, given, door))
    if prediction is not None:
        return await acknowledge(given, door, prediction)
    if press.action == chat.CANCEL:
        send_text = partial(follow_up, door.http, given.token)
        door.later(chat.best_effort(door, chat.cancel(door, press.prediction_id, send_text)))
    elif given.message is not None:
        door.later(chat.best_effort(door, delete_message(given, given.message, door)))
    return Reply.json({"type": UNCHANGED})


async def delete_message(given: Interaction, message: Message, door: Door) -> None:
    """Delete the message of a button; by the press's token if the bot cannot."""
    message_url = f"{URL}/channels/{given.channel_id}/messages/{message.id}"
    answer = await door.http.delete(message_url, headers=BOT)
    if not answer.is_success:
        await asyncio.sleep(LOOKS[0])  # the token works only after the press was answered
        check(await door.http.delete(original_url(given.token), headers=AGENT), given.token)


async def acknowledge(given: Interaction, door: Door, prediction: Prediction) -> Reply:
    """Answer with the message that the pictures will replace."""
    if prediction.status in chat.FINAL:
        return ephemeral(await chat.ack_text(door, prediction))
    door.later(chat.best_effort(door, find_message(given, door, prediction.id)))
    cancel = {"Cancel": chat.button(door.sign, chat.CANCEL, prediction.id)}
    words = await chat.ack_text(door, prediction)
    return Reply.json({"type": MESSAGE, "data": text_message(words, cancel)})


async def find_message(given: Interaction, door: Door, prediction_id: str) -> None:
    """Record the id of the answer's message, for the time after its token expires."""
    for seconds in LOOKS:
        await asyncio.sleep(seconds)
        answer = await door.http.get(original_url(given.token), headers=AGENT)
        if answer.is_success:
            message = msgspec.json.decode(answer.content, type=Message)
            await door.annotate(prediction_id, discord_reply=message.id)
        if answer.is_success or is_dead(answer):
            return


def is_dead(answer: httpx.Response) -> bool:
    """Return whether an interaction's token is refused: it is not to be used again."""
    return answer.status_code == httpx.codes.UNAUTHORIZED or bool(
        re.search(rb'"code":\s*10015\b', answer.content)
    )


def webhook_url(token: str) -> str:
    return f"{URL}/webhooks/{APPLICATION}/{quote(token, safe='')}"


def original_url(token: str) -> str:
    return f"{webhook_url(token)}/messages/@original"


async def follow_up(http: httpx.AsyncClient, token: str, text: str) -> None:
    """Send to the person alone, as long as the token is valid."""
    answer = await http.post(
        webhook_url(token), json=text_message(text) | {"flags": ALONE}, headers=AGENT
    )
    check(answer, token)


# --- answers ---


class Target(msgspec.Struct):
    """The destination of an answer, and the ways to reach it."""

    user: str
    channel: str
    reply: str
    """The id of the first answer; empty if unknown."""
    token: str
    """Empty if the private values were emptied."""


@on("*", name="discord-in", metadata={"answered_by": "discord-in"}, timeout=600, after="save")
async def answer(event: Event, ctx: Context) -> None:
    user = chat.user_of(event, "in/discord")
    channel = event.prediction.named("discord_channel", r"\d{1,20}")
    reply = event.prediction.named("discord_reply", r"\d{1,20}")
    target = Target(user, channel, reply, ctx.private.get("token", ""))
    if event.type != "prediction.succeeded":
        if not await ctx.once("tell", partial(notify, event, ctx, target)):
            target.token = ""
        await ctx.once("clean", partial(remove_ack, ctx, target))
        return
    await post_all(event, ctx, partial(post, event, ctx, target))


async def post(
    event: Event, ctx: Context, target: Target, first: int, outputs: list[Output]
) -> list[str]:
    """Post some outputs; return those that could only be linked, with the reasons."""
    most_bytes = min(MOST_BYTES, ctx.private.get("most_bytes") or MOST_BYTES)
    found = await fetch_results(event, ctx, first, outputs, most_bytes)
    if event.prediction.flagged:
        found.files = {f"SPOILER_{name}": file for name, file in found.files.items()}
        found.links = [re.sub(r"^http\S+$", r"||<\g<0>>||", one) for one in found.links]
    message = found.message(event, WORDS)
    if event.prediction.flagged:
        message["embeds"] = [
            {k: v for k, v in e.items() if k != "image"} for e in message["embeds"]
        ]
        message["embeds"] = [embed for embed in message["embeds"] if embed]
    if not first:
        labels = ctx.private.get("labels", [])
        buttons = chat.result_buttons(ctx.sign, event.prediction.id, labels, chat.DELETE)
        message["components"] = rows(buttons)
        if await edit_first(ctx, target, message, found):
            return found.lost
    await post_new(ctx, target, message, found)
    return found.lost


async def edit_first(ctx: Context, target: Target, message: dict[str, Any], found: Results) -> bool:
    """Replace the first answer by a result: by the token, or as the bot; return if it succeeded."""

    async def edit(url: str, headers: dict[str, str]) -> bool:
        response = await send(ctx.http, "PATCH", url, message, found.files, headers)
        try:
            check(response, target.token or TOKEN.reveal())
        except Dead as refused:
            ctx.log.info("discord.fallback", reason=str(refused))
            return False
        return True

    # Once, over all attempts: a token that was refused must not be used again.
    if target.token and await ctx.once("edit", partial(edit, original_url(target.token), AGENT)):
        return True
    channel = f"{URL}/channels/{target.channel}/messages/{target.reply}"
    return bool(target.reply) and await edit(channel, BOT)


async def post_new(ctx: Context, target: Target, message: dict[str, Any], found: Results) -> None:
    """Post a new message: where it was ordered, or else directly."""
    mention = f"<@{target.user}>\n" if not found.first else ""
    message = message | {
        "content": shortened(mention + message["content"], LONGEST_CONTENT),
        "allowed_mentions": {"users": [target.user]},
        **once(f"{ctx.idempotency_key}/{found.first}"),
    }
    url = f"{URL}/channels/{target.channel}/messages"
    response = await send(ctx.http, "POST", url, message, found.files, BOT)
    try:
        check(response, TOKEN.reveal())
    except Dead as refused:
        ctx.log.info("discord.fallback", reason=str(refused))
        url = await direct_url(ctx.http, target.user)
        response = await send(ctx.http, "POST", url, message, found.files, BOT)
        check(response, TOKEN.reveal())


async def direct_url(http: httpx.AsyncClient, user: str) -> str:
    """Return the URL for direct messages to a user."""
    answer = await http.post(f"{URL}/users/@me/channels", json={"recipient_id": user}, headers=BOT)
    channel = msgspec.json.decode(check(answer, TOKEN.reveal()).content, type=Message)
    return f"{URL}/channels/{channel.id}/messages"


async def notify(event: Event, ctx: Context, target: Target) -> bool:
    """Send the person alone the reason for a missing picture: by the token, or directly.

    Return whether the token was good.
    """
    again = chat.result_buttons(ctx.sign, event.prediction.id, [])
    message = text_message(chat.failure_text(event), again)
    if target.token:
        answer = await ctx.http.post(
            webhook_url(target.token), json=message | {"flags": ALONE}, headers=AGENT
        )
        try:
            check(answer, target.token)
        except Dead as refused:
            ctx.log.info("discord.fallback", reason=str(refused))
        else:
            return True
    message |= once(ctx.idempotency_key)
    url = await direct_url(ctx.http, target.user)
    check(await ctx.http.post(url, json=message, headers=BOT), TOKEN.reveal())
    return False


async def remove_ack(ctx: Context, target: Target) -> None:
    """Delete the acknowledgement, if possible."""
    answer = (
        await ctx.http.delete(original_url(target.token), headers=AGENT) if target.token else None
    )
    if target.reply and (answer is None or not answer.is_success):
        url = f"{URL}/channels/{target.channel}/messages/{target.reply}"
        await ctx.http.delete(url, headers=BOT)
