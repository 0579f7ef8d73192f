"""Post every outcome to Discord, with its files, as a bot or by a webhook.

Use: `DISCORD_TOKEN=… DISCORD_CHANNEL=123… receiver serve save discord`, or
`DISCORD_WEBHOOK=https://discord.com/api/webhooks/… receiver serve save discord`.

DISCORD_TOKEN      a bot's token; it may send messages, embed links and attach files
DISCORD_CHANNEL    the id of the bot's channel
DISCORD_WEBHOOK    a webhook's address, instead of both
DISCORD_TEXT       what to say: a Template in Discord's markdown
DISCORD_MAX_BYTES  larger results are linked. Default: 10485760
DISCORD_URL        default: https://discord.com/api/v10

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
from urllib.parse import quote

import httpx
import msgspec

from receiver import Context, Dead, Event, Fetched, Output, Retry, Template, expect, on

TOKEN = os.environ.get("DISCORD_TOKEN", "").strip()
CHANNEL = os.environ.get("DISCORD_CHANNEL", "").strip()
WEBHOOK = os.environ.get("DISCORD_WEBHOOK", "").strip()
TEMPLATE = Template(os.environ.get("DISCORD_TEXT") or "{prompt:.1000}\n{error:.500}{text:.1500}")
SECONDS = Template("{seconds}")
MOST_BYTES = os.environ.get("DISCORD_MAX_BYTES") or "10485760"
URL = (os.environ.get("DISCORD_URL") or "https://discord.com/api/v10").rstrip("/")
SECURE = r"(https://[^/?#@]+|http://(127\.0\.0\.1|localhost)(:\d+)?)/"
ID = r"\d{5,20}"
MOST_FILES = 10
MOST_IN_ALL = 24_000_000  # of a request's 25 MB
LONGEST = 4096
LONGEST_CONTENT = 2000
LONGEST_TITLE = 256
PATIENCE = 120.0
COLOURS = {"succeeded": 0x2E9E5B, "failed": 0xC93C37, "canceled": 0x8A8F98}
SHOWN = {"image/png", "image/jpeg", "image/gif", "image/webp"}
JSON = "application/json"
AS_THEY_ARE = ":/?#[]@!$&'()*+,;=%~"

# What is no header value would be quoted, secret and all, by the error of the one who sends it.
IS_BOT = bool(re.fullmatch(r"[\w.-]+", TOKEN, re.ASCII) and re.fullmatch(ID, CHANNEL, re.ASCII))
IS_WEBHOOK = bool(re.fullmatch(SECURE + r"[\w./-]*webhooks/\d+/[\w-]+", WEBHOOK, re.ASCII))
if bool(TOKEN or CHANNEL) == bool(WEBHOOK) or not (IS_BOT or IS_WEBHOOK):
    raise ValueError(
        "discord needs either DISCORD_TOKEN and DISCORD_CHANNEL (an id of digits), "
        "or DISCORD_WEBHOOK (an address like https://discord.com/api/webhooks/…/…)"
    )
if not re.fullmatch(r"[1-9]\d{0,14}", MOST_BYTES, re.ASCII):
    raise ValueError(f"DISCORD_MAX_BYTES must be a number of bytes, not {MOST_BYTES!r}")
if not re.match(SECURE, f"{URL}/"):
    raise ValueError("DISCORD_URL must be an address that starts with https://")
SECRET = TOKEN or WEBHOOK.rpartition("/")[2]
HEADERS = {"user-agent": "DiscordBot (prediction-receiver, 1)"}
if IS_BOT:
    HEADERS["authorization"] = f"Bot {TOKEN}"
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
    """Give files by their names, links to those that do not come along, and why they do not."""
    files: dict[str, Fetched] = {}
    links, lost = [], []
    room = MOST_IN_ALL
    for number, output in enumerate(outputs, first):
        try:
            file = await ctx.fetch(output, max_bytes=min(room, int(MOST_BYTES)))
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
    text = flag(event) + TEMPLATE.fill(event, escape).strip()
    return {
        "title": cut(escape(event.prediction.model), LONGEST_TITLE),
        "description": cut(text, LONGEST),
        "color": COLOURS[event.prediction.status],
        "fields": [{"name": n, "value": v, "inline": True} for n, v in fields.items() if v],
    }


def of_a_bot(event: Event, ctx: Context, first: int) -> dict[str, Any]:
    """Add what only bots may: tell a repeat, and answer a message."""
    nonce = sha256(f"{ctx.idempotency_key}/{first}".encode()).hexdigest()[:25]
    message = named(event, "discord_message")
    answers = {"message_id": message, "fail_if_not_exists": False}
    more = {"message_reference": answers} if message else {}
    return {"nonce": nonce, "enforce_nonce": True, **more}


def place(event: Event) -> tuple[str, dict[str, str]]:
    thread = named(event, "discord_thread")
    if IS_BOT:  # for whom a thread is a channel
        channel = thread or named(event, "discord_channel") or CHANNEL
        return f"{URL}/channels/{channel}/messages", {}
    return WEBHOOK, {"wait": "true"} | ({"thread_id": thread} if thread else {})


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
    linked = quote(output.address, safe=AS_THEY_ARE)
    return linked if 0 < len(linked) < LONGEST_CONTENT else "(a result that has no address)"


def joined(links: list[str]) -> str:
    """Join as many as a message takes."""
    text = ""
    for one in links:
        text += f"{one}\n" if len(text) + len(one) < LONGEST_CONTENT else ""
    return text


def flag(event: Event) -> str:
    reason = event.prediction.flagged[:100].replace("_", " ")
    return f"(flagged: {escape(reason)})\n" if reason else ""


def named(event: Event, key: str) -> str:
    """Read an id from the metadata, where there may be anything."""
    found = re.fullmatch(ID, str(event.prediction.metadata.get(key)), re.ASCII)
    return found[0] if found else ""


def escape(text: str) -> str:
    return re.sub(r"([\\*_~`|<>\[\]()@#:])", r"\\\1", text)


def cut(text: str, most: int) -> str:
    """Cut what is too long, though not after a backslash."""
    return text if len(text) <= most else text[: most - 1].rstrip("\\") + "…"
