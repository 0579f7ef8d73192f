"""Post every outcome to a Telegram chat: pictures and films as such, the rest as documents.

Use: `TELEGRAM_TOKEN=123:… TELEGRAM_CHAT=-100123… receiver serve save telegram`.

TELEGRAM_TOKEN      the bot's token, as BotFather gave it
TELEGRAM_CHAT       the chat's id, or the @name of a public channel
TELEGRAM_TEXT       what to say: a Template, sent as plain text
TELEGRAM_MAX_BYTES  larger results are linked. Default: 50000000
TELEGRAM_URL        default: https://api.telegram.org

A prediction's metadata may name another chat as `telegram_chat`, the message to answer as
`telegram_message` and a forum's topic as `telegram_thread`. Telegram cannot tell a repeat: a
message whose answer was lost on its way may come twice.
"""

import logging
import os
import re
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import msgspec

from receiver import Context, Dead, Event, Fetched, Output, Retry, Template, expect, on

TOKEN = os.environ.get("TELEGRAM_TOKEN", "").strip()
CHAT = os.environ.get("TELEGRAM_CHAT", "").strip()
TEMPLATE = Template(
    os.environ.get("TELEGRAM_TEXT")
    or "{type}: {prompt:.500}\n{provider} · {model:.200}\n{error:.300}{text:.3000}"
)
MOST_BYTES = os.environ.get("TELEGRAM_MAX_BYTES") or "50000000"
URL = (os.environ.get("TELEGRAM_URL") or "https://api.telegram.org").rstrip("/")
CHATS, ID = r"-?\d{1,20}|@\w{4,64}", r"[1-9]\d{0,17}"
KINDS = {
    "image/jpeg": "photo",
    "image/png": "photo",
    "image/webp": "photo",
    "image/gif": "animation",
    "video/mp4": "video",
    "audio/mpeg": "audio",
    "audio/mp4": "audio",
}
"""What Telegram shows or plays; all else is a document."""
GROUPED = {"photo", "video"}
MOST_IN_GROUP = 10
MOST_PHOTO_BYTES = 10_000_000
MOST_PIXELS = 10_000  # width and height together
MOST_RATIO = 20
LONGEST_MESSAGE, LONGEST_CAPTION, LONGEST_LINK = 4096, 1024, 4000
UNFIT = re.compile("PHOTO_|IMAGE_PROCESS_FAILED|group send failed")
"""What Telegram says of pictures that it takes as documents only."""
PATIENCE = 180.0
AS_THEY_ARE = ":/?#[]@!$&'()*+,;=%~"

if not re.fullmatch(r"\d+:[\w-]+", TOKEN, re.ASCII):
    raise ValueError("telegram needs TELEGRAM_TOKEN: a bot's token like 123456:ABC…")
if not re.fullmatch(CHATS, CHAT, re.ASCII):
    raise ValueError(f"telegram needs TELEGRAM_CHAT: an id like -100123 or @name, not {CHAT!r}")
if not re.fullmatch(r"[1-9]\d{0,14}", MOST_BYTES, re.ASCII):
    raise ValueError(f"TELEGRAM_MAX_BYTES must be a number of bytes, not {MOST_BYTES!r}")
if not re.match(r"(https://[^/?#@]+|http://(127\.0\.0\.1|localhost)(:\d+)?)/", f"{URL}/"):
    raise ValueError("TELEGRAM_URL must be an address that starts with https://")
SECRET = TOKEN.partition(":")[2]
logging.getLogger("httpx").setLevel(logging.WARNING)  # else it logs addresses, with the token


class Parameters(msgspec.Struct, frozen=True):
    retry_after: Annotated[float, msgspec.Meta(ge=0)] | None = None
    migrate_to_chat_id: int | None = None


class Said(msgspec.Struct):
    """What Telegram answers."""

    description: str = ""
    parameters: Parameters = Parameters()


class Part(msgspec.Struct):
    """A file as it is to be sent."""

    kind: str
    name: str
    file: Fetched


@on("*", name="telegram", timeout=900, after="save")
async def telegram(event: Event, ctx: Context) -> None:
    ctx.note(await ctx.once("post", partial(post, event, ctx)))


async def post(event: Event, ctx: Context) -> str:
    """Send all messages, each of them once; say what could only be linked, and why."""
    parts, links, lost = [], [], []
    for number, output in enumerate(event.prediction.output or []):
        if output.url:
            try:
                parts.append(await fetched(event, ctx, number, output))
            except Dead as error:
                links.append(link(output))
                lost.append(f"output {number}: {error}")
    ctx.note("\n".join(lost))
    text = told(event, links)
    for key, some in messages(parts, bool(links)).items():
        await ctx.once(key, partial(insist, event, ctx, some, text))
        text = ""
    return "\n".join(lost)


async def fetched(event: Event, ctx: Context, number: int, output: Output) -> Part:
    file = await ctx.fetch(output, max_bytes=int(MOST_BYTES))
    if not file.size:
        raise Dead("it is empty")
    kind = KINDS.get(file.content_type, "document")
    if kind == "photo" and (file.size > MOST_PHOTO_BYTES or is_misshapen(output)):
        kind = "document"
    return Part(kind, f"{event.prediction.id}-{number}.{file.extension}", file)


def is_misshapen(output: Output) -> bool:
    short, long = sorted((output.width or 0, output.height or 0))
    return short > 0 and (short + long > MOST_PIXELS or long > MOST_RATIO * short)


def messages(parts: list[Part], has_links: bool) -> dict[str, list[Part]]:
    """Group what may go together, by names that stay the same when an output is lost later."""
    album = [part for part in parts if part.kind in GROUPED]
    found = {f"album/{n}": group for n, group in enumerate(groups(album))}
    found |= {part.name: [part] for part in parts if part.kind not in GROUPED}
    # Links go into a text of their own: one may be longer than a caption.
    return {"text": [], **found} if has_links or not found else found


def groups(album: list[Part]) -> list[list[Part]]:
    """Cut an album into what Telegram takes at once."""
    found: list[list[Part]] = []
    room = 0
    for part in album:
        if not found or len(found[-1]) == MOST_IN_GROUP or part.file.size > room:
            found.append([])
            room = int(MOST_BYTES)
        found[-1].append(part)
        room -= part.file.size
    return found


async def insist(event: Event, ctx: Context, parts: list[Part], text: str) -> None:
    """Send to where the chat has moved, and as documents what is not taken as it is."""
    form = address(event)
    answer, said = await call(ctx, form, parts, text)
    if said.parameters.migrate_to_chat_id is not None:
        form["chat_id"] = str(said.parameters.migrate_to_chat_id)
        answer, said = await call(ctx, form, parts, text)
    if UNFIT.search(said.description):
        parts = [Part("document", part.name, part.file) for part in parts]
        answer, said = await call(ctx, form, parts, text)
    expect(answer, after=said.parameters.retry_after)


def address(event: Event) -> dict[str, str]:
    """Say where to, and what is answered."""
    form = {"chat_id": named(event, "telegram_chat", CHATS) or CHAT}
    if thread := named(event, "telegram_thread", ID):
        form["message_thread_id"] = thread
    if message := named(event, "telegram_message", ID):
        answers = {"message_id": int(message), "allow_sending_without_reply": True}
        form["reply_parameters"] = written(answers)
    return form


async def call(
    ctx: Context, form: dict[str, str], parts: list[Part], text: str
) -> tuple[httpx.Response, Said]:
    method, more = request(parts, text)
    with ExitStack() as stack:
        files = {}
        for n, part in enumerate(parts):
            field = f"file{n}" if "media" in more else part.kind
            files[field] = (part.name, stack.enter_context(part.file.path.open("rb")))
        url = f"{URL}/bot{TOKEN}/{method}"
        answer = await ctx.http.post(url, data=form | more, files=files, timeout=PATIENCE)
    if not answer.is_success and SECRET in answer.text:  # a proxy's page that quotes the address
        raise Retry(f"HTTP {answer.status_code} from something before Telegram")
    try:
        return answer, msgspec.json.decode(answer.content, type=Said)
    except msgspec.MsgspecError:
        return answer, Said()


def request(parts: list[Part], text: str) -> tuple[str, dict[str, str]]:
    """Choose the method, and what it takes beside address and files."""
    if not parts:
        return "sendMessage", {"text": text, "link_preview_options": '{"is_disabled":true}'}
    caption = {"caption": cut(text, LONGEST_CAPTION)} if text else {}
    if len(parts) == 1:
        return f"send{parts[0].kind.capitalize()}", caption
    media = [{"type": part.kind, "media": f"attach://file{n}"} for n, part in enumerate(parts)]
    media[0] |= caption
    return "sendMediaGroup", {"media": written(media)}


def told(event: Event, links: list[str]) -> str:
    """Say what there is to say; the text gives way to links, as far as these fit."""
    tail = ""
    for one in links:
        tail += f"\n{one}" if len(tail) + len(one) < LONGEST_MESSAGE - len(event.type) else ""
    text = flag(event) + TEMPLATE.fill(event, clean).strip() or event.type
    return cut(text, LONGEST_MESSAGE - len(tail)) + tail


def clean(text: str) -> str:
    """Keep a name from being a mention, by a joiner that nobody sees."""
    return text.replace("@", "@\N{WORD JOINER}")


def cut(text: str, most: int) -> str:
    """Cut what is too long, counted as Telegram does: by halves of what UTF-16 writes in two."""
    raw = text.encode("utf-16-le")
    return text if len(raw) <= 2 * most else raw[: 2 * most - 2].decode("utf-16-le", "ignore") + "…"


def link(output: Output) -> str:
    """Link a result where it is kept, or else where it was made."""
    linked = quote(output.address, safe=AS_THEY_ARE)
    return linked if 0 < len(linked) < LONGEST_LINK else "(a result that has no address)"


def flag(event: Event) -> str:
    reason = event.prediction.flagged[:100].replace("_", " ")
    return f"(flagged: {clean(reason)})\n" if reason else ""


def named(event: Event, key: str, pattern: str) -> str:
    """Read an id from the metadata, where there may be anything."""
    found = re.fullmatch(pattern, str(event.prediction.metadata.get(key)), re.ASCII)
    return found[0] if found else ""


def written(value: Any) -> str:
    return msgspec.json.encode(value).decode()
