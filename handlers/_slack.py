"""Slack's Web API, as `slack` and `slack-in` post results by it."""

import html
import re
from functools import partial
from typing import Any

import httpx
import msgspec

from receiver import Context, Dead, Event, Output, Retry, Secret, Template, cut, expect

LONGEST = 3000
MOST_FILES = 10
MOST_LINKS = 40
PATIENCE = 120.0
FINAL = re.compile(
    r"invalid_\w+|missing_\w+|not_\w+|no_\w+|\w+_not_\w+|\w+_denied|restricted_\w+|\w+_restricted"
    r"|\w+_disabled|(channel_)?is_archived|\w+_too_long|token_\w+|\w+_inactive|\w+_required"
    r"|malformed_file"
)
ABOUT, NO_TIME = Template("{provider} · {model} · {seconds} s"), " ·  s"


class Said(msgspec.Struct):
    """What Slack answers."""

    ok: bool
    error: str = "nothing of a reason"
    needed: str = ""
    upload_url: str = ""
    file_id: str = ""
    channel: Any = None
    file: dict[str, Any] = {}


class Slack:
    """The API, as it is reached."""

    def __init__(self, token: Secret, url: str, most_bytes: int) -> None:
        self.token = token
        self.url = url
        self.most_bytes = most_bytes
        """The largest result to upload."""

    @property
    def safe(self) -> tuple[str, ...]:
        """How an address begins that files may go to: they are not for everybody."""
        return "https://", str(httpx.URL(self.url).join("/"))

    async def call(self, http: httpx.AsyncClient, method: str, **form: str) -> Said:
        headers = {"authorization": f"Bearer {self.token.reveal()}"}
        answer = expect(await http.post(f"{self.url}/{method}", data=form, headers=headers))
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

    async def files(self, event: Event, ctx: Context) -> tuple[list[Any], list[str]]:
        """Upload all results, each once; return the files, and links to what does not come along.

        What that is, and why, is noted.
        """
        files, links, lost = [], [], []
        for number, output in enumerate(event.prediction.output or []):
            if output.url:
                step = partial(self.upload, event, ctx, number, output)
                told = await ctx.once(f"upload/{number}", step)
                if "id" in told:
                    files.append(told)
                else:
                    links.append(link(output))
                    lost.append(f"output {number}: {told['lost']}")
        ctx.note("\n".join(lost))
        return files, links

    async def upload(
        self, event: Event, ctx: Context, number: int, output: Output
    ) -> dict[str, str]:
        """Bring one result to Slack, where nobody sees it before it is posted; or say why not."""
        if number >= MOST_FILES:
            return {"lost": f"{MOST_FILES} files go into a message"}
        try:
            file = await ctx.fetch(output, max_bytes=self.most_bytes)
        except Dead as error:
            return {"lost": str(error)}
        if not file.size:
            return {"lost": "it is empty"}
        name = f"{event.prediction.id}-{number}.{file.extension}"
        wanted = {"filename": name, "length": str(file.size)}
        place = await self.call(ctx.http, "files.getUploadURLExternal", **wanted)
        if not place.upload_url.startswith(self.safe):
            raise Dead("Slack wants the file at an address that is not https")
        with file.path.open("rb") as content:
            parts = {"file": (name, content)}
            expect(await ctx.http.post(place.upload_url, files=parts, timeout=PATIENCE))
        return {"id": place.file_id, "title": name}

    async def post(
        self,
        http: httpx.AsyncClient,
        channel: str,
        thread: str,
        text: str,
        blocks: list[Any],
        files: list[Any],
    ) -> None:
        """Post one message with files that were uploaded."""
        form = {"blocks": written(blocks)} | ({"thread_ts": thread} if thread else {})
        if files:
            form |= {"channel_id": channel, "files": written(files)}
            await self.call(http, "files.completeUploadExternal", **form)
        else:
            form |= {"channel": channel, "text": text, "unfurl_links": "false"}
            await self.call(http, "chat.postMessage", **form)

    async def has_shown(self, http: httpx.AsyncClient, files: list[Any]) -> bool:
        """Return whether a message with these files is there already."""
        if not files:
            return False
        said = await self.call(http, "files.info", file=files[0]["id"])
        return bool(said.file.get("shares"))


def blocks_of(event: Event, text: str, links: list[str]) -> list[dict[str, Any]]:
    about = shortened(ABOUT.fill(event, escape).removesuffix(NO_TIME))
    texts = [section(said) for said in [text, *links[:MOST_LINKS]]]
    return [*texts, {"type": "context", "elements": [words(about)]}]


def section(text: str) -> dict[str, Any]:
    return {"type": "section", "text": words(text)}


def words(text: str) -> dict[str, Any]:
    # Verbatim: Slack makes no links and mentions of what only looks like them.
    return {"type": "mrkdwn", "text": text, "verbatim": True}


def actions(buttons: dict[str, str]) -> list[dict[str, Any]]:
    """Return the block of some buttons, by their labels; none without any."""
    elements = [
        {
            "type": "button",
            "action_id": f"do{number}",
            "text": {"type": "plain_text", "text": cut(label, 75)},
            "value": value,
        }
        for number, (label, value) in enumerate(list(buttons.items())[:25])
    ]
    return [{"type": "actions", "elements": elements}] if elements else []


def link(output: Output) -> str:
    """Link a result where it is kept, or else where it was made."""
    linked = escape(output.link(LONGEST))
    return f"<{linked}>" if 0 < len(linked) <= LONGEST - 2 else "(a result that has no address)"


def escape(text: str) -> str:
    return html.escape(text, quote=False)


def unescape(text: str) -> str:
    """Return what somebody typed, without Slack's markup of links, channels and entities."""
    text = re.sub(r"<(?:mailto:)?([^@#!<>|][^<>|]*)(?:\|[^<>]*)?>", r"\1", text)
    text = re.sub(r"<#\w+\|([^<>]*)>", r"#\1", text)
    return html.unescape(re.sub(r"<![^<>]*>", "", text))


def shortened(text: str) -> str:
    return cut(text, LONGEST, partial=r"&\w*")


def written(value: Any) -> str:
    return msgspec.json.encode(value).decode()
