"""Slack's Web API, as far as `slack` and `slack-in` use it."""

import html
import re
from functools import partial
from typing import Annotated, Any

import httpx
import msgspec

from receiver import Context, Dead, Event, Output, Retry, Secret, Template, cut, expect

from ._chat import to_json

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


class ApiResponse(msgspec.Struct):
    """An answer of Slack."""

    ok: bool
    error: str = "no error given"
    needed: str = ""
    upload_url: str = ""
    file_id: str = ""
    channel: Any = None
    file: dict[str, Any] = {}


class Slack:
    """A client of the Web API."""

    def __init__(self, token: Secret, url: str, most_bytes: int) -> None:
        self.token = token
        self.url = url
        self.most_bytes = most_bytes
        """The largest result to upload, in bytes."""

    @property
    def safe(self) -> tuple[str, ...]:
        """Prefixes of the addresses that private files may be sent to."""
        return "https://", str(httpx.URL(self.url).join("/"))

    async def call(self, http: httpx.AsyncClient, method: str, **form: str) -> ApiResponse:
        headers = {"authorization": f"Bearer {self.token.reveal()}"}
        answer = expect(await http.post(f"{self.url}/{method}", data=form, headers=headers))
        try:
            response = msgspec.json.decode(answer.content, type=ApiResponse)
        except msgspec.MsgspecError:
            raise Retry(f"what answers {method} is not Slack") from None
        if response.ok:
            return response
        reason = f"{method}: {response.error} {response.needed}".strip()
        if FINAL.fullmatch(response.error):
            raise Dead(reason)
        wait = answer.headers.get("retry-after", "")
        raise Retry(reason, after=float(wait) if re.fullmatch(r"\d{1,6}", wait) else None)

    async def files(self, event: Event, ctx: Context) -> tuple[list[Any], list[str]]:
        """Upload all results, each once; return the files, and links to those that are not sent.

        The latter are noted with the reasons.
        """
        files, links, lost = [], [], []
        for number, output in enumerate(event.prediction.output or []):
            if output.url:
                step = partial(self.upload, event, ctx, number, output)
                result = await ctx.once(f"upload/{number}", step)
                if "id" in result:
                    files.append(result)
                else:
                    links.append(link(output))
                    lost.append(f"output {number}: {result['lost']}")
        ctx.note("\n".join(lost))
        return files, links

    async def upload(
        self, event: Event, ctx: Context, number: int, output: Output
    ) -> dict[str, str]:
        """Upload one result, which is visible only when posted; if not possible, return why."""
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
        *,
        previews: bool = True,
    ) -> None:
        """Post one message with uploaded files; `previews`: Slack may show previews of links."""
        form = {"blocks": to_json(blocks)} | ({"thread_ts": thread} if thread else {})
        if files:
            form |= {"channel_id": channel, "files": to_json(files)}
            await self.call(http, "files.completeUploadExternal", **form)
        else:
            form |= {"channel": channel, "text": text, "unfurl_links": "false"}
            form |= {} if previews else {"unfurl_media": "false"}
            await self.call(http, "chat.postMessage", **form)

    async def is_posted(self, http: httpx.AsyncClient, files: list[Any]) -> bool:
        """Return whether a message with these files was posted already."""
        if not files:
            return False
        response = await self.call(http, "files.info", file=files[0]["id"])
        return bool(response.file.get("shares"))


def blocks_of(event: Event, text: str, links: list[str]) -> list[dict[str, Any]]:
    about = shortened(ABOUT.fill(event, escape).removesuffix(NO_TIME))
    texts = [section(line) for line in [text, *links[:MOST_LINKS]]]
    return [*texts, {"type": "context", "elements": [mrkdwn(about)]}]


def section(text: str) -> dict[str, Any]:
    return {"type": "section", "text": mrkdwn(text)}


def mrkdwn(text: str) -> dict[str, Any]:
    # Verbatim: Slack does not turn text that looks like links and mentions into them.
    return {"type": "mrkdwn", "text": text, "verbatim": True}


def actions(buttons: dict[str, str]) -> list[dict[str, Any]]:
    """Return a list with the block of some buttons, by label; empty without buttons."""
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
    """Return the link to a result: where it is kept, else the provider's URL."""
    linked = escape(output.link(LONGEST))
    return f"<{linked}>" if 0 < len(linked) <= LONGEST - 2 else "(a result that has no address)"


def escape(text: str) -> str:
    return html.escape(text, quote=False)


def unescape(text: str) -> str:
    """Return typed text without Slack's markup of links, channels and entities."""
    text = re.sub(r"<(?:mailto:)?([^@#!<>|][^<>|]*)(?:\|[^<>]*)?>", r"\1", text)
    text = re.sub(r"<#\w+\|([^<>]*)>", r"#\1", text)
    return html.unescape(re.sub(r"<![^<>]*>", "", text))


def shortened(text: str) -> str:
    return cut(text, LONGEST, partial=r"&\w*")


# --- Slack's requests ---

HUMAN = ("", "file_share", "thread_broadcast")
"""Subtypes of messages that people write."""

Id = Annotated[str, msgspec.Meta(pattern=r"^[A-Z][A-Z0-9]{0,40}\Z")]
Ts = Annotated[str, msgspec.Meta(pattern=r"^([0-9]{1,12}\.[0-9]{6})?\Z")]


class Slash(msgspec.Struct):
    """A slash command."""

    channel_id: Id
    user_id: Id
    command: str
    trigger_id: str
    team_id: str = ""
    text: str = ""
    response_url: str = ""


class UserMessage(msgspec.Struct):
    """A mention, or a direct message."""

    channel: Id
    ts: Ts
    user: Id
    text: str = ""
    thread_ts: Ts = ""
    files: list[dict[str, Any]] = []


class Ref(msgspec.Struct):
    id: Id


class Authorization(msgspec.Struct):
    user_id: str = ""


class Envelope(msgspec.Struct):
    """A request with a JSON body."""

    type: str
    challenge: str = ""
    team_id: str | None = None
    event: dict[str, Any] = {}
    authorizations: list[Authorization] | None = None


class Container(msgspec.Struct):
    message_ts: str = ""
    thread_ts: Ts = ""


class Action(msgspec.Struct):
    value: str = ""


class Payload(msgspec.Struct):
    """A pressed button."""

    type: str
    user: Ref | None = None
    team: dict[str, Any] | None = None
    channel: Ref | None = None
    container: Container = msgspec.field(default_factory=Container)
    actions: list[Action] = []
    trigger_id: str = ""
    response_url: str = ""


def is_for_us(event: dict[str, Any]) -> bool:
    """Return whether an event is a message from a person to the bot."""
    is_to_bot = event.get("type") == "app_mention" or (
        event.get("type") == "message" and event.get("channel_type") == "im"
    )
    is_by_bot = any(event.get(name) for name in ("bot_id", "bot_profile", "app_id"))
    is_human = event.get("subtype", "") in HUMAN and event.get("user") not in (None, "USLACKBOT")
    return is_to_bot and is_human and not is_by_bot


def without_mention(text: str, bots: list[Authorization]) -> str:
    """Return the text without the mention of the bot; other mentions stay."""
    ours = "|".join(re.escape(bot.user_id) for bot in bots if bot.user_id) or r"[UW]\w+"
    return re.sub(rf"<@(?:{ours})(?:\|[^<>]*)?>", " ", text, count=0 if bots else 1).strip()
