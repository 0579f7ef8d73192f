"""Post every outcome to Discord, with its files, as a bot or by a webhook.

Use: `DISCORD_TOKEN=… DISCORD_CHANNEL=123… receiver serve save discord`, or
`DISCORD_WEBHOOK=https://discord.com/api/webhooks/… receiver serve save discord`.

A prediction's metadata may name another channel as `discord_channel` and the message to answer as
`discord_message` (both for bots), and a thread as `discord_thread`. Discord knows a bot's repeats
for some minutes; a webhook's message whose answer was lost on its way may come twice.
"""

import logging
import os
import re
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from typing import Annotated, Any

import httpx
import msgspec

from receiver import (
    Context,
    Dead,
    Event,
    Fetched,
    Output,
    Retry,
    Secret,
    Template,
    cut,
    expect,
    on,
    read_settings,
)

SECONDS = Template("{seconds}")
ID = r"\d{5,20}"
WAYS = ("TOKEN", "CHANNEL", "WEBHOOK")
HOOK = r"(https://[^/?#@]+|http://(127\.0\.0\.1|localhost)(:\d+)?)/[\w./-]*webhooks/\d+/[\w-]+"
MOST_FILES = 10
MOST_IN_ALL = 24_000_000  # of a request's 25 MB
LONGEST = 4096
LONGEST_CONTENT = 2000
LONGEST_TITLE = 256
PATIENCE = 120.0
COLOURS = {"succeeded": 0x2E9E5B, "failed": 0xC93C37, "canceled": 0x8A8F98}
SHOWN = {"image/png", "image/jpeg", "image/gif", "image/webp"}
JSON = "application/json"


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
HEADERS = {"user-agent": "DiscordBot (prediction-receiver, 1)"}
if IS_BOT:
    HEADERS["authorization"] = f"Bot {TOKEN.reveal()}"
logging.getLogger("httpx").setLevel(logging.WARNING)  # else it logs the webhook, secret and all


class Limited(msgspec.Struct):
    """What Discord answers to those who ask too often."""

    retry_after: Annotated[float, msgspec.Meta(ge=0)] | None = None


@on("*", name="discord", timeout=600, after="save")
async def discord(event: Event, ctx: Context) -> None:
    outputs = [output for output in event.prediction.output or [] if output.url]
    lost = []
    for first in range(0, len(outputs) or 1, MOST_FILES):
        some = outputs[first : first + MOST_FILES]
        lost += await ctx.once(f"post/{first}", partial(post, event, ctx, first, some))
    ctx.note("\n".join(lost))


async def post(event: Event, ctx: Context, first: int, outputs: list[Output]) -> list[str]:
    """Post some outputs; say which of them could only be linked, and why."""
    files, links, lost = await fetched(event, ctx, first, outputs)
    message = {
        "content": joined(links),
        "embeds": embeds(event, first, [n for n, f in files.items() if f.content_type in SHOWN]),
        "attachments": [{"id": n, "filename": name} for n, name in enumerate(files)],
        "allowed_mentions": {"parse": []},
        **(of_a_bot(event, ctx, first) if IS_BOT else {}),
    }
    parts: dict[str, Any] = {"payload_json": (None, msgspec.json.encode(message), JSON)}
    with ExitStack() as stack:
        for n, (name, file) in enumerate(files.items()):
            parts[f"files[{n}]"] = (name, stack.enter_context(file.path.open("rb")))
        url, params = place(event)
        answer = await ctx.http.post(
            url, params=params, files=parts, headers=HEADERS, timeout=PATIENCE
        )
    judge(answer)
    return lost


async def fetched(
    event: Event, ctx: Context, first: int, outputs: list[Output]
) -> tuple[dict[str, Fetched], list[str], list[str]]:
    """Return files by their names, links to those that do not come along, and why they do not."""
    files: dict[str, Fetched] = {}
    links, lost = [], []
    room = MOST_IN_ALL
    for number, output in enumerate(outputs, first):
        try:
            file = await ctx.fetch(output, max_bytes=min(room, MOST_BYTES))
            if not file.size:
                raise Dead("it is empty")  # noqa: TRY301 - it is linked, as what is too large
        except Dead as error:
            links.append(link(output))
            lost.append(f"output {number}: {error}")
        else:
            files[f"{event.prediction.id}-{number}.{file.extension}"] = file
            room -= file.size
    return files, links, lost


def embeds(event: Event, first: int, pictures: list[str]) -> list[dict[str, Any]]:
    """Show the pictures, and say the rest above the first of all."""
    shown = [{"image": {"url": f"attachment://{name}"}} for name in pictures]
    return shown if first else [about(event) | dict(*shown[:1]), *shown[1:]]


def about(event: Event) -> dict[str, Any]:
    fields = {"provider": event.prediction.provider, "seconds": SECONDS.fill(event)}
    text = event.prediction.warning(escape) + TEMPLATE.fill(event, escape).strip()
    return {
        "title": shortened(escape(event.prediction.model), LONGEST_TITLE),
        "description": shortened(text, LONGEST),
        "color": COLOURS[event.prediction.status],
        "fields": [{"name": n, "value": v, "inline": True} for n, v in fields.items() if v],
    }


def of_a_bot(event: Event, ctx: Context, first: int) -> dict[str, Any]:
    """Add what only bots may: tell a repeat, and answer a message."""
    nonce = sha256(f"{ctx.idempotency_key}/{first}".encode()).hexdigest()[:25]
    message = event.prediction.named("discord_message", ID)
    answers = {"message_id": message, "fail_if_not_exists": False}
    more = {"message_reference": answers} if message else {}
    return {"nonce": nonce, "enforce_nonce": True, **more}


def place(event: Event) -> tuple[str, dict[str, str]]:
    thread = event.prediction.named("discord_thread", ID)
    if IS_BOT:  # for whom a thread is a channel
        channel = thread or event.prediction.named("discord_channel", ID) or CHANNEL
        return f"{URL}/channels/{channel}/messages", {}
    return WEBHOOK.reveal(), {"wait": "true"} | ({"thread_id": thread} if thread else {})


def judge(answer: httpx.Response) -> None:
    if not answer.is_success and SECRET in answer.text:  # a proxy's page that quotes the address
        raise Retry(f"HTTP {answer.status_code} from something before Discord")
    try:
        limited = msgspec.json.decode(answer.content, type=Limited)
    except msgspec.MsgspecError:
        limited = Limited()
    expect(answer, after=limited.retry_after)


def link(output: Output) -> str:
    """Link a result where it is kept, or else where it was made."""
    return output.link(LONGEST_CONTENT - 1) or "(a result that has no address)"


def joined(links: list[str]) -> str:
    """Join as many as a message takes."""
    text = ""
    for one in links:
        text += f"{one}\n" if len(text) + len(one) < LONGEST_CONTENT else ""
    return text


def escape(text: str) -> str:
    return re.sub(r"([\\*_~`|<>\[\]()@#:])", r"\\\1", text)


def shortened(text: str, longest: int) -> str:
    return cut(text, longest, partial=r"\\+")
