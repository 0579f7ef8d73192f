"""Post every outcome to Discord, with its files, as a bot or by a webhook.

Use: `DISCORD_TOKEN=… DISCORD_CHANNEL=123… receiver serve save discord`, or
`DISCORD_WEBHOOK=https://discord.com/api/webhooks/… receiver serve save discord`.

A prediction's metadata may name another channel as `discord_channel` and the message to answer as
`discord_message` (both for bots), and a thread as `discord_thread`. Discord detects a bot's repeats
for some minutes; a webhook's message may be posted twice if Discord's answer was lost. Orders from
Discord are answered by `discord-in`.
"""

import logging
import os
import re
from functools import partial
from typing import Any

from receiver import Context, Event, Output, Secret, Skip, on, read_settings

from ._discord import AGENT, ID, check, fetch_results, once, post_all, send

WAYS = ("TOKEN", "CHANNEL", "WEBHOOK")
HOOK = r"(https://[^/?#@]+|http://(127\.0\.0\.1|localhost)(:\d+)?)/[\w./-]*webhooks/\d+/[\w-]+"


def webhook(text: str) -> Secret:
    if text and not re.fullmatch(HOOK, text, re.ASCII):
        raise ValueError("must be an address like https://discord.com/api/webhooks/…/…")
    return Secret(text)


with read_settings() as read:
    TOKEN = read.secret(
        "DISCORD_TOKEN",
        "a bot's token; it may send messages, embed links and attach files",
        r"[\w.-]+",
        default="",
    )
    CHANNEL = read.matching("DISCORD_CHANNEL", "the id of the bot's channel", ID, default="")
    WEBHOOK = read.parsed("DISCORD_WEBHOOK", "a webhook's address", webhook, default="")
    TEMPLATE = read.template(
        "DISCORD_TEXT",
        "what to say: a Template in Discord's markdown",
        default="{prompt:.1000}\n{error:.500}{text:.1500}",
    )
    MOST_BYTES = read.size(
        "DISCORD_MAX_BYTES", "the largest result to post; larger ones are linked", default="10MiB"
    )
    URL = read.url(
        "DISCORD_URL", "where the API is", default="https://discord.com/api/v10", secure=True
    )
    given = {name for name in WAYS if os.environ.get(f"DISCORD_{name}", "").strip()}
    if given not in ({"TOKEN", "CHANNEL"}, {"WEBHOOK"}):
        read.refuse(
            "discord needs either DISCORD_TOKEN and DISCORD_CHANNEL (an id of digits), "
            "or DISCORD_WEBHOOK (an address like https://discord.com/api/webhooks/…/…)"
        )

IS_BOT = bool(CHANNEL)
SECRET = TOKEN.reveal() or WEBHOOK.reveal().rpartition("/")[2]
HEADERS = AGENT | ({"authorization": f"Bot {TOKEN.reveal()}"} if IS_BOT else {})
logging.getLogger("httpx").setLevel(logging.WARNING)  # else it logs the webhook, secret and all


@on("*", name="discord", timeout=600, after="save")
async def discord(event: Event, ctx: Context) -> None:
    if event.prediction.order and event.prediction.order.via == "in/discord":
        raise Skip("discord-in answers what was ordered in Discord")
    await post_all(event, ctx, partial(post, event, ctx))


async def post(event: Event, ctx: Context, first: int, outputs: list[Output]) -> list[str]:
    """Post some outputs; return those that could only be linked, with the reasons."""
    found = await fetch_results(event, ctx, first, outputs, MOST_BYTES)
    more = of_a_bot(event, ctx, first) if IS_BOT else {}
    message = found.message(event, TEMPLATE) | more
    url, params = place(event)
    check(await send(ctx.http, "POST", url, message, found.files, HEADERS, params), SECRET)
    return found.lost


def of_a_bot(event: Event, ctx: Context, first: int) -> dict[str, Any]:
    """Return the fields that only bots may send: a nonce against repeats, and a reply."""
    message = event.prediction.named("discord_message", ID)
    answers = {"message_id": message, "fail_if_not_exists": False}
    more = {"message_reference": answers} if message else {}
    return once(f"{ctx.idempotency_key}/{first}") | more


def place(event: Event) -> tuple[str, dict[str, str]]:
    thread = event.prediction.named("discord_thread", ID)
    if IS_BOT:  # for a bot, a thread is a channel
        channel = thread or event.prediction.named("discord_channel", ID) or CHANNEL
        return f"{URL}/channels/{channel}/messages", {}
    return WEBHOOK.reveal(), {"wait": "true"} | ({"thread_id": thread} if thread else {})
