"""Discord's messages, as `discord` and `discord-in` post them."""

import re
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from functools import partial
from hashlib import sha256
from typing import Annotated, Any

import httpx
import msgspec

from receiver import Context, Dead, Event, Fetched, Output, Retry, Template, cut, expect

SECONDS = Template("{seconds}")
ID = r"\d{5,20}"
MOST_FILES = 10
MOST_IN_ALL = 24_000_000  # of a request's 25 MB
LONGEST_TEXT = 4096
LONGEST_CONTENT = 2000
LONGEST_LINKS = 1960  # beside a mention
LONGEST_LINK = 1950  # that may be put behind a spoiler
LONGEST_TITLE = 256
LONGEST_LABEL = 80
IN_ROW, MOST_ROWS = 5, 5
PATIENCE = 120.0
COLOURS = {"succeeded": 0x2E9E5B, "failed": 0xC93C37, "canceled": 0x8A8F98}
SHOWN = {"image/png", "image/jpeg", "image/gif", "image/webp"}
JSON = "application/json"
AGENT = {"user-agent": "DiscordBot (prediction-receiver, 1)"}


class Limited(msgspec.Struct):
    """Discord's answer to too many requests."""

    retry_after: Annotated[float, msgspec.Meta(ge=0)] | None = None


class Results(msgspec.Struct):
    """Some outputs to post: files by name, and links to the others."""

    first: int
    files: dict[str, Fetched]
    links: list[str]
    lost: list[str]
    """The reason for each link."""

    def message(self, event: Event, template: Template) -> dict[str, Any]:
        shown = [n for n, f in self.files.items() if f.content_type in SHOWN]
        return {
            "content": joined(self.links),
            "embeds": embeds(event, self.first, shown, template),
            "attachments": [{"id": n, "filename": name} for n, name in enumerate(self.files)],
            "allowed_mentions": {"parse": []},
        }


async def fetch_results(
    event: Event, ctx: Context, first: int, outputs: list[Output], most_bytes: int
) -> Results:
    """Return files by name, links to outputs that cannot be attached, and the reasons."""
    found = Results(first, {}, [], [])
    room = MOST_IN_ALL
    for number, output in enumerate(outputs, first):
        try:
            file = await ctx.fetch(output, max_bytes=min(room, most_bytes))
            if not file.size:
                raise Dead("it is empty")  # noqa: TRY301 - it is linked, as a too large one
        except Dead as error:
            found.links.append(link(output))
            found.lost.append(f"output {number}: {error}")
        else:
            found.files[f"{event.prediction.id}-{number}.{file.extension}"] = file
            room -= file.size
    return found


async def send(
    http: httpx.AsyncClient,
    method: str,
    url: str,
    message: dict[str, Any],
    files: dict[str, Fetched],
    headers: dict[str, str],
    params: dict[str, str] | None = None,
) -> httpx.Response:
    """Send a message with its files; return the answer unchecked."""
    parts: dict[str, Any] = {"payload_json": (None, msgspec.json.encode(message), JSON)}
    with ExitStack() as stack:
        for n, (name, file) in enumerate(files.items()):
            parts[f"files[{n}]"] = (name, stack.enter_context(file.path.open("rb")))
        return await http.request(
            method, url, params=params, files=parts, headers=headers, timeout=PATIENCE
        )


async def post_all(
    event: Event, ctx: Context, post: Callable[[int, list[Output]], Awaitable[list[str]]]
) -> None:
    """Post the outputs, as many at once as fit into a message; note those that are only linked."""
    outputs = [output for output in event.prediction.output or [] if output.url]
    lost = []
    for first in range(0, len(outputs) or 1, MOST_FILES):
        some = outputs[first : first + MOST_FILES]
        lost += await ctx.once(f"post/{first}", partial(post, first, some))
    ctx.note("\n".join(lost))


def once(key: str) -> dict[str, Any]:
    """Return the fields by which Discord detects a bot's repeats, for some minutes."""
    return {"nonce": sha256(key.encode()).hexdigest()[:25], "enforce_nonce": True}


def check(answer: httpx.Response, secret: str) -> httpx.Response:
    """Return a 2xx answer; raise Dead or Retry for others, which never quote the secret."""
    if not answer.is_success and secret in answer.text:  # a proxy's page that quotes the URL
        raise Retry(f"HTTP {answer.status_code} from something before Discord")
    try:
        limited = msgspec.json.decode(answer.content, type=Limited)
    except msgspec.MsgspecError:
        limited = Limited()
    return expect(answer, after=limited.retry_after)


def embeds(
    event: Event, first: int, pictures: list[str], template: Template
) -> list[dict[str, Any]]:
    """Return an embed per picture; the first of all contains the text too."""
    shown = [{"image": {"url": f"attachment://{name}"}} for name in pictures]
    return shown if first else [about(event, template) | dict(*shown[:1]), *shown[1:]]


def about(event: Event, template: Template) -> dict[str, Any]:
    fields = {"provider": event.prediction.provider, "seconds": SECONDS.fill(event)}
    text = event.prediction.warning(escape) + template.fill(event, escape).strip()
    return {
        "title": shortened(escape(event.prediction.model), LONGEST_TITLE),
        "description": shortened(text, LONGEST_TEXT),
        "color": COLOURS[event.prediction.status],
        "fields": [{"name": n, "value": v, "inline": True} for n, v in fields.items() if v],
    }


def rows(buttons: dict[str, str]) -> list[dict[str, Any]]:
    """Return the components of some buttons, by label."""
    found = [
        {"type": 2, "style": 2, "label": cut(label, LONGEST_LABEL), "custom_id": value}
        for label, value in list(buttons.items())[: IN_ROW * MOST_ROWS]
    ]
    cuts = range(0, len(found), IN_ROW)
    return [{"type": 1, "components": found[first : first + IN_ROW]} for first in cuts]


def link(output: Output) -> str:
    """Return the link to a result: where it is kept, else the provider's URL."""
    return output.link(LONGEST_LINK) or "(a result that has no address)"


def joined(links: list[str]) -> str:
    """Return as many links as fit into a message, one per line."""
    text = ""
    for one in links:
        text += f"{one}\n" if len(text) + len(one) < LONGEST_LINKS else ""
    return text


def escape(text: str) -> str:
    return re.sub(r"([\\*_~`|<>\[\]()@#:])", r"\\\1", text)


def shortened(text: str, longest: int) -> str:
    return cut(text, longest, partial=r"\\+")


# --- Discord's interactions ---

Id = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,20}\Z")]


class User(msgspec.Struct):
    id: Id


class Member(msgspec.Struct):
    user: User
    permissions: str = "0"


class Option(msgspec.Struct):
    name: str
    type: int
    value: Any = None


class Attachment(msgspec.Struct):
    url: str


class Resolved(msgspec.Struct):
    attachments: dict[str, Attachment] = {}


class Data(msgspec.Struct):
    name: str = ""
    options: list[Option] = []
    resolved: Resolved = msgspec.field(default_factory=Resolved)
    custom_id: str = ""


class Message(msgspec.Struct):
    id: Id


class Interaction(msgspec.Struct):
    """A PING, a command or a pressed button."""

    type: int
    id: Id = "0"
    token: str = ""
    data: Data = msgspec.field(default_factory=Data)
    guild_id: Id | None = None
    channel_id: Id | None = None
    member: Member | None = None
    user: User | None = None
    message: Message | None = None
    attachment_size_limit: int | None = None
