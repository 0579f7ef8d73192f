"""Post every outcome to a Telegram chat: pictures and videos as such, the rest as documents.

Use: `TELEGRAM_TOKEN=123:… TELEGRAM_CHAT=-100123… receiver serve save telegram`.

A prediction's metadata may name another chat as `telegram_chat`, the message to answer as
`telegram_message` and a forum's topic as `telegram_thread`. Telegram does not detect repeats: a
message may be posted twice if Telegram's answer was lost. Orders from Telegram are answered by
`telegram-in`.
"""

import logging
from functools import partial

from receiver import Context, Event, Skip, on, read_settings

from ._telegram import CHATS, Telegram, address, clean, with_links

with read_settings() as read:
    TOKEN = read.secret(
        "TELEGRAM_TOKEN", "a bot's token like 123456:ABC…, from BotFather", r"\d+:[\w-]+"
    )
    CHAT = read.matching(
        "TELEGRAM_CHAT", "an id like -100123, or the @name of a public channel", CHATS
    )
    TEMPLATE = read.template(
        "TELEGRAM_TEXT",
        "what to say: a Template, sent as plain text",
        default="{type}: {prompt:.500}\n{provider} · {model:.200}\n{error:.300}{text:.3000}",
    )
    MOST_BYTES = read.size(
        "TELEGRAM_MAX_BYTES", "the largest result to post; larger ones are linked", default="50MB"
    )
    URL = read.url(
        "TELEGRAM_URL", "where the Bot API is", default="https://api.telegram.org", secure=True
    )

TELEGRAM = Telegram(TOKEN, URL, MOST_BYTES)

logging.getLogger("httpx").setLevel(logging.WARNING)  # else it logs addresses, with the token


@on("*", name="telegram", timeout=900, after="save")
async def telegram(event: Event, ctx: Context) -> None:
    if event.prediction.order and event.prediction.order.via == "in/telegram":
        raise Skip("telegram-in answers what was ordered in Telegram")
    ctx.note(await ctx.once("post", partial(post, event, ctx)))


async def post(event: Event, ctx: Context) -> str:
    """Send all messages, each once; return the outputs that could only be linked, and why."""
    parts, links = await TELEGRAM.parts(event, ctx)
    lost = ctx.noted
    filled = event.prediction.warning(clean) + TEMPLATE.fill(event, clean).strip()
    text = with_links(filled or event.type, links, len(event.type))
    form = address(event, CHAT)
    # Links go into a separate text message: one may be longer than a caption.
    for key, some in TELEGRAM.messages(parts, bool(links)).items():
        await ctx.once(key, partial(TELEGRAM.deliver, ctx.http, form, some, text))
        text = ""
    return lost
