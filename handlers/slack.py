"""Post every outcome to Slack, with its files, in one message.

Use: `SLACK_TOKEN=xoxb-… SLACK_CHANNEL=C0123456789 receiver serve save slack`.

A prediction's metadata may name another channel as `slack_channel`, and as `slack_thread` the `ts`
of the message to answer. Slack cannot tell a repeat: a message whose answer was lost on its way may
come twice.
"""

import html
import re
from functools import partial
from typing import Any

import httpx
import msgspec

from receiver import Context, Dead, Event, Output, Retry, Template, cut, expect, on, read_settings

CHANNELS, THREADS = r"[A-Z][A-Z0-9]+", r"\d+\.\d{6}"
LONGEST = 3000
MOST_FILES = 10
MOST_LINKS = 40
PATIENCE = 120.0
FINAL = re.compile(
    r"invalid_\w+|missing_\w+|not_\w+|no_\w+|\w+_not_\w+|\w+_denied|restricted_\w+|\w+_restricted"
    r"|\w+_disabled|(channel_)?is_archived|\w+_too_long|token_\w+|\w+_inactive|\w+_required"
    r"|malformed_file"
)

with read_settings() as read:
    TOKEN = read.secret(
        "SLACK_TOKEN",
        "a bot's token (xoxb-…) with the scopes chat:write and files:write",
        r"xox[\w.-]+",
    )
    CHANNEL = read.matching("SLACK_CHANNEL", "an id like C0123456789 (not a name)", CHANNELS)
    TEMPLATE = read.template(
        "SLACK_TEXT",
        "what to say: a Template in Slack's mrkdwn",
        default="*{type}*: {prompt:.1000}\n{error:.500}{text:.1200}",
    )
    MOST_BYTES = read.size(
        "SLACK_MAX_BYTES", "the largest result to post; larger ones are linked", default="100MB"
    )
    URL = read.url(
        "SLACK_URL", "where Slack's API is", default="https://slack.com/api", secure=True
    )

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
        file = await ctx.fetch(output, max_bytes=MOST_BYTES)
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
    said = event.prediction.warning(escape) + TEMPLATE.fill(event, escape).strip()
    text = shortened(said or event.type)
    channel = event.prediction.named("slack_channel", CHANNELS) or CHANNEL
    thread = event.prediction.named("slack_thread", THREADS)
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
    about = shortened(ABOUT.fill(event, escape).removesuffix(NO_TIME))
    texts = [{"type": "section", "text": words(said)} for said in [text, *links[:MOST_LINKS]]]
    return [*texts, {"type": "context", "elements": [words(about)]}]


def words(text: str) -> dict[str, Any]:
    # Verbatim: Slack makes no links and mentions of what only looks like them.
    return {"type": "mrkdwn", "text": text, "verbatim": True}


def link(output: Output) -> str:
    """Link a result where it is kept, or else where it was made."""
    linked = escape(output.link(LONGEST))
    return f"<{linked}>" if 0 < len(linked) <= LONGEST - 2 else "(a result that has no address)"


def escape(text: str) -> str:
    return html.escape(text, quote=False)


def shortened(text: str) -> str:
    return cut(text, LONGEST, partial=r"&\w*")


def written(value: Any) -> str:
    return msgspec.json.encode(value).decode()


async def call(ctx: Context, method: str, **form: str) -> Said:
    headers = {"authorization": f"Bearer {TOKEN.reveal()}"}
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
