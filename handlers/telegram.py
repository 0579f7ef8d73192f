"""Post every outcome to a Telegram chat: pictures and films as such, the rest as documents.

Use: `TELEGRAM_TOKEN=123:… TELEGRAM_CHAT=-100123… receiver serve save telegram`.

A prediction's metadata may name another chat as `telegram_chat`, the message to answer as
`telegram_message` and a forum's topic as `telegram_thread`. Telegram cannot tell a repeat: a
message whose answer was lost on its way may come twice.
"""

import logging
import re
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any

import httpx
import msgspec

from receiver import Context, Dead, Event, Fetched, Output, Retry, cut, expect, on, read_settings

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

SECRET = TOKEN.reveal().partition(":")[2]
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
    file = await ctx.fetch(output, max_bytes=MOST_BYTES)
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
            room = MOST_BYTES
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
    form = {"chat_id": event.prediction.named("telegram_chat", CHATS) or CHAT}
    if thread := event.prediction.named("telegram_thread", ID):
        form["message_thread_id"] = thread
    if message := event.prediction.named("telegram_message", ID):
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
        url = f"{URL}/bot{TOKEN.reveal()}/{method}"
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
    caption = {"caption": cut(text, LONGEST_CAPTION, utf16=True)} if text else {}
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
    text = event.prediction.warning(clean) + TEMPLATE.fill(event, clean).strip() or event.type
    return cut(text, LONGEST_MESSAGE - len(tail), utf16=True) + tail


def clean(text: str) -> str:
    """Keep a name from being a mention, by a joiner that nobody sees."""
    return text.replace("@", "@\N{WORD JOINER}")


def link(output: Output) -> str:
    """Link a result where it is kept, or else where it was made."""
    return output.link(LONGEST_LINK) or "(a result that has no address)"


def written(value: Any) -> str:
    return msgspec.json.encode(value).decode()
