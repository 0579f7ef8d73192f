"""Post every outcome to Slack, with its files, in one message.

Use: `SLACK_TOKEN=xoxb-… SLACK_CHANNEL=C0123456789 receiver serve save slack`.

SLACK_TOKEN      a bot's token with the scopes chat:write and files:write; the bot is in the channel
SLACK_CHANNEL    the channel's id, not its name
SLACK_TEXT       what to say: a Template in Slack's mrkdwn
SLACK_MAX_BYTES  larger results are linked. Default: 100000000
SLACK_URL        default: https://slack.com/api

A prediction's metadata may name another channel as `slack_channel`, and as `slack_thread` the `ts`
of the message to answer. Slack cannot tell a repeat: a message whose answer was lost on its way may
come twice.
"""

import html
import os
import re
from functools import partial
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from receiver import Context, Dead, Event, Output, Retry, Template, expect, on

TOKEN = os.environ.get("SLACK_TOKEN", "").strip()
CHANNEL = os.environ.get("SLACK_CHANNEL", "").strip()
TEXT = os.environ.get("SLACK_TEXT") or "*{type}*: {prompt:.1000}\n{error:.500}{text:.1200}"
MOST_BYTES = os.environ.get("SLACK_MAX_BYTES") or "100000000"
URL = (os.environ.get("SLACK_URL") or "https://slack.com/api").rstrip("/")
CHANNELS, THREADS = r"[A-Z][A-Z0-9]+", r"\d+\.\d{6}"
LONGEST = 3000
MOST_FILES = 10
MOST_LINKS = 40
PATIENCE = 120.0
AS_THEY_ARE = ":/?#[]@!$&'()*+,;=%~"
FINAL = re.compile(
    r"invalid_\w+|missing_\w+|not_\w+|no_\w+|\w+_not_\w+|\w+_denied|restricted_\w+|\w+_restricted"
    r"|\w+_disabled|(channel_)?is_archived|\w+_too_long|token_\w+|\w+_inactive|\w+_required"
    r"|malformed_file"
)

# What is no header value would be quoted, secret and all, by the error of the one who sends it.
if not re.fullmatch(r"xox[\w.-]+", TOKEN, re.ASCII):
    raise ValueError("slack needs SLACK_TOKEN: a bot's token, which starts with xoxb-")
if not re.fullmatch(CHANNELS, CHANNEL):
    raise ValueError(f"slack needs SLACK_CHANNEL: an id like C0123456789, not {CHANNEL!r}")
if not re.fullmatch(r"[1-9]\d{0,14}", MOST_BYTES, re.ASCII):
    raise ValueError(f"SLACK_MAX_BYTES must be a number of bytes, not {MOST_BYTES!r}")
if not re.match(r"(https://[^/?#@]+|http://(127\.0\.0\.1|localhost)(:\d+)?)/", f"{URL}/"):
    raise ValueError("SLACK_URL must be an address that starts with https://")
TEMPLATE = Template(TEXT)
ABOUT, NO_TIME = Template("{provider} · {model} · {seconds} s"), " ·  s"
SAFE = ("https://", str(httpx.URL(URL).join("/")))
"""How an address begins that files may go to: Slack names them, and files are not for everybody."""


class Said(msgspec.Struct):
    """What Slack answers."""

    ok: bool
    error: str = "nothing of a reason"
    needed: str = ""
    upload_url: str = ""
    file_id: str = ""


@on("*", name="slack", timeout=600, after="save")
async def slack(event: Event, ctx: Context) -> None:
    files, links, lost = [], [], []
    for number, output in enumerate(event.prediction.output or []):
        if output.url:
            told = await ctx.once(f"upload/{number}", partial(upload, event, ctx, number, output))
            if "id" in told:
                files.append(told)
            else:
                links.append(link(output))
                lost.append(f"output {number}: {told['lost']}")
    ctx.note("\n".join(lost))
    await ctx.once("post", partial(post, event, ctx, files, links))


async def upload(event: Event, ctx: Context, number: int, output: Output) -> dict[str, str]:
    """Bring one result to Slack, where nobody sees it before it is posted; or say why not."""
    if number >= MOST_FILES:
        return {"lost": f"{MOST_FILES} files go into a message"}
    try:
        file = await ctx.fetch(output, max_bytes=int(MOST_BYTES))
    except Dead as error:
        return {"lost": str(error)}
    if not file.size:
        return {"lost": "it is empty"}
    name = f"{event.prediction.id}-{number}.{file.extension}"
    place = await call(ctx, "files.getUploadURLExternal", filename=name, length=str(file.size))
    if not place.upload_url.startswith(SAFE):
        raise Dead("Slack wants the file at an address that is not https")
    with file.path.open("rb") as content:
        parts = {"file": (name, content)}
        expect(await ctx.http.post(place.upload_url, files=parts, timeout=PATIENCE))
    return {"id": place.file_id, "title": name}


async def post(event: Event, ctx: Context, files: list[Any], links: list[str]) -> None:
    text = cut(flag(event) + TEMPLATE.fill(event, escape).strip() or event.type)
    channel = named(event, "slack_channel", CHANNELS) or CHANNEL
    thread = named(event, "slack_thread", THREADS)
    form = {"blocks": written(blocks(event, text, links))}
    if thread:
        form["thread_ts"] = thread
    if files:
        form |= {"channel_id": channel, "files": written(files)}
        await call(ctx, "files.completeUploadExternal", **form)
    else:
        form |= {"channel": channel, "text": text, "unfurl_links": "false"}
        await call(ctx, "chat.postMessage", **form)


def blocks(event: Event, text: str, links: list[str]) -> list[dict[str, Any]]:
    about = cut(ABOUT.fill(event, escape).removesuffix(NO_TIME))
    texts = [{"type": "section", "text": words(said)} for said in [text, *links[:MOST_LINKS]]]
    return [*texts, {"type": "context", "elements": [words(about)]}]


def words(text: str) -> dict[str, Any]:
    # Verbatim: Slack makes no links and mentions of what only looks like them.
    return {"type": "mrkdwn", "text": text, "verbatim": True}


def link(output: Output) -> str:
    """Link a result where it is kept, or else where it was made."""
    linked = f"<{escape(quote(output.address, safe=AS_THEY_ARE))}>"
    return linked if output.address and len(linked) <= LONGEST else "(a result that has no address)"


def flag(event: Event) -> str:
    reason = event.prediction.flagged[:100].replace("_", " ")
    return f"(flagged: {escape(reason)})\n" if reason else ""


def named(event: Event, key: str, pattern: str) -> str:
    """Read an id from the metadata, where there may be anything."""
    found = re.fullmatch(pattern, str(event.prediction.metadata.get(key)), re.ASCII)
    return found[0] if found else ""


def escape(text: str) -> str:
    return html.escape(text, quote=False)


def cut(text: str) -> str:
    """Cut what is too long, though not within `&amp;`."""
    return text if len(text) <= LONGEST else re.sub(r"&\w*$", "", text[: LONGEST - 1]) + "…"


def written(value: Any) -> str:
    return msgspec.json.encode(value).decode()


async def call(ctx: Context, method: str, **form: str) -> Said:
    headers = {"authorization": f"Bearer {TOKEN}"}
    answer = expect(await ctx.http.post(f"{URL}/{method}", data=form, headers=headers))
    try:
        said = msgspec.json.decode(answer.content, type=Said)
    except msgspec.MsgspecError:
        raise Retry(f"what answers {method} is not Slack") from None
    if said.ok:
        return said
    reason = f"{method}: {said.error} {said.needed}".strip()
    if FINAL.fullmatch(said.error):
        raise Dead(reason)
    wait = answer.headers.get("retry-after", "")
    raise Retry(reason, after=float(wait) if re.fullmatch(r"\d{1,6}", wait) else None)
