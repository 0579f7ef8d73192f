"""Telegram's Bot API, as far as `telegram` and `telegram-in` use it."""

import re
from contextlib import ExitStack
from typing import Annotated, Any

import httpx
import msgspec

from receiver import Context, Dead, Event, Fetched, Output, Retry, Secret, cut, expect

from ._chat import MOST_PICTURE, to_json

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
"""Types that Telegram shows or plays; all other files are documents."""
GROUPED = {"photo", "video"}
HIDEABLE = {*GROUPED, "animation"}
"""What can be put behind a spoiler."""
MOST_IN_GROUP = 10
MOST_PHOTO_BYTES = 10_000_000
MOST_PIXELS = 10_000  # width and height together
MOST_RATIO = 20
LONGEST_MESSAGE, LONGEST_CAPTION, LONGEST_LINK = 4096, 1024, 4000
UNFIT = re.compile("PHOTO_|IMAGE_PROCESS_FAILED|group send failed")
"""Telegram's errors for pictures that it accepts as documents only."""
PATIENCE = 180.0


class Parameters(msgspec.Struct, frozen=True):
    retry_after: Annotated[float, msgspec.Meta(ge=0)] | None = None
    migrate_to_chat_id: int | None = None


class ApiResponse(msgspec.Struct):
    """An answer of Telegram."""

    description: str = ""
    result: Any = None
    parameters: Parameters = Parameters()


class Part(msgspec.Struct):
    """A file to send."""

    kind: str
    name: str
    file: Fetched
    is_flagged: bool = False
    """Whether it is hidden until a person opens it."""
    link: str = ""


class Telegram:
    """A client of the Bot API."""

    def __init__(self, token: Secret, url: str, most_bytes: int) -> None:
        self.token = token
        self.url = url
        self.most_bytes = most_bytes
        """The largest result to send, in bytes."""

    async def parts(
        self, event: Event, ctx: Context, *, flagged: bool = False
    ) -> tuple[list[Part], list[str]]:
        """Return files, and links to results that cannot be sent; note these, with the reason."""
        parts, links, lost = [], [], []
        for number, output in enumerate(event.prediction.output or []):
            if output.url:
                try:
                    parts.append(await self.fetch(event, ctx, number, output, flagged))
                except Dead as error:
                    links.append(link(output))
                    lost.append(f"output {number}: {error}")
        ctx.note("\n".join(lost))
        return parts, links

    async def fetch(
        self, event: Event, ctx: Context, number: int, output: Output, flagged: bool
    ) -> Part:
        file = await ctx.fetch(output, max_bytes=self.most_bytes)
        if not file.size:
            raise Dead("it is empty")
        kind = KINDS.get(file.content_type, "document")
        if kind == "photo" and (file.size > MOST_PHOTO_BYTES or is_misshapen(output)):
            kind = "document"
        if flagged and kind not in HIDEABLE:
            raise Dead(f"it is flagged, and Telegram hides no {kind}")
        name = f"{event.prediction.id}-{number}.{file.extension}"
        return Part(kind, name, file, flagged, link(output))

    def messages(self, parts: list[Part], has_text: bool) -> dict[str, list[Part]]:
        """Group parts into messages, by keys that stay the same if an output is lost later.

        `has_text`: a message with the text alone is sent first.
        """
        album = [part for part in parts if part.kind in GROUPED]
        found = {f"album/{n}": group for n, group in enumerate(self.groups(album))}
        found |= {part.name: [part] for part in parts if part.kind not in GROUPED}
        return {"text": [], **found} if has_text or not found else found

    def groups(self, album: list[Part]) -> list[list[Part]]:
        """Split an album into groups that Telegram accepts."""
        found: list[list[Part]] = []
        room = 0
        for part in album:
            if not found or len(found[-1]) == MOST_IN_GROUP or part.file.size > room:
                found.append([])
                room = self.most_bytes
            found[-1].append(part)
            room -= part.file.size
        return found

    async def deliver(
        self, http: httpx.AsyncClient, form: dict[str, str], parts: list[Part], text: str
    ) -> None:
        """Send a message: to the new chat if it has moved, and refused pictures as documents."""
        answer, body = await self.send(http, form, parts, text)
        if body.parameters.migrate_to_chat_id is not None:
            form = form | {"chat_id": str(body.parameters.migrate_to_chat_id)}
            answer, body = await self.send(http, form, parts, text)
        if UNFIT.search(body.description):
            # Telegram hides no documents.
            text = with_links(text, [part.link for part in parts if part.is_flagged])
            parts = [Part("document", p.name, p.file) for p in parts if not p.is_flagged]
            answer, body = await self.send(http, form, parts, text)
        expect(answer, after=body.parameters.retry_after)

    async def send(
        self, http: httpx.AsyncClient, form: dict[str, str], parts: list[Part], text: str
    ) -> tuple[httpx.Response, ApiResponse]:
        method, more = request(parts, text)
        with ExitStack() as stack:
            files = {}
            for n, part in enumerate(parts):
                field = f"file{n}" if "media" in more else part.kind
                files[field] = (part.name, stack.enter_context(part.file.path.open("rb")))
            return await self.post(http, method, form | more, files)

    async def call(self, http: httpx.AsyncClient, method: str, **form: Any) -> Any:
        """Call a method; return its result, or raise Dead or Retry."""
        given = {k: v if isinstance(v, str) else to_json(v) for k, v in form.items()}
        answer, body = await self.post(http, method, given, {})
        expect(answer, after=body.parameters.retry_after)
        return body.result

    async def post(
        self, http: httpx.AsyncClient, method: str, form: dict[str, str], files: dict[str, Any]
    ) -> tuple[httpx.Response, ApiResponse]:
        url = f"{self.url}/bot{self.token.reveal()}/{method}"
        answer = await http.post(url, data=form, files=files, timeout=PATIENCE)
        secret = self.token.reveal().partition(":")[2]
        # A proxy's error page may quote the URL, which holds the token.
        if not answer.is_success and secret in answer.text:
            raise Retry(f"HTTP {answer.status_code} from something before Telegram")
        try:
            body = msgspec.json.decode(answer.content, type=ApiResponse)
        except msgspec.MsgspecError:
            return answer, ApiResponse()
        if "thread not found" in body.description and "message_thread_id" in form:
            # In groups without topics, a message in a chain of replies has a thread id, too.
            form = {name: value for name, value in form.items() if name != "message_thread_id"}
            return await self.post(http, method, form, files)
        return answer, body


def address(event: Event, chat: str) -> dict[str, str]:
    """Return a message's destination: the chat, the thread, and the message it replies to."""
    form = {"chat_id": event.prediction.named("telegram_chat", CHATS) or chat}
    if thread := event.prediction.named("telegram_thread", ID):
        form["message_thread_id"] = thread
    if message := event.prediction.named("telegram_message", ID):
        form["reply_parameters"] = answering(int(message))
    return form


def answering(message: int) -> str:
    return to_json({"message_id": message, "allow_sending_without_reply": True})


def keyboard(buttons: dict[str, str]) -> dict[str, str]:
    """Return the parameter that puts buttons, by label, under a message."""
    row = [{"text": label, "callback_data": value} for label, value in buttons.items()]
    return {"reply_markup": to_json({"inline_keyboard": [row]})} if row else {}


def is_misshapen(output: Output) -> bool:
    short, long = sorted((output.width or 0, output.height or 0))
    return short > 0 and (short + long > MOST_PIXELS or long > MOST_RATIO * short)


def request(parts: list[Part], text: str) -> tuple[str, dict[str, str]]:
    """Return the method, and its parameters except the destination and files."""
    if not parts:
        return "sendMessage", {"text": text, "link_preview_options": '{"is_disabled":true}'}
    caption = {"caption": cut(text, LONGEST_CAPTION, utf16=True)} if text else {}
    if len(parts) == 1:
        hidden = {"has_spoiler": "true"} if parts[0].is_flagged else {}
        return f"send{parts[0].kind.capitalize()}", caption | hidden
    media: list[dict[str, Any]] = [
        {"type": part.kind, "media": f"attach://file{n}"}
        | ({"has_spoiler": True} if part.is_flagged else {})
        for n, part in enumerate(parts)
    ]
    media[0] |= caption
    return "sendMediaGroup", {"media": to_json(media)}


def with_links(text: str, links: list[str], least: int = 0) -> str:
    """Return a text followed by links; the text is cut for them, but to no less than `least`."""
    tail = ""
    for one in links:
        tail += f"\n{one}" if len(tail) + len(one) < LONGEST_MESSAGE - least else ""
    return cut(text, LONGEST_MESSAGE - len(tail), utf16=True) + tail


def clean(text: str) -> str:
    """Prevent mentions: put an invisible joiner after each @."""
    return text.replace("@", "@\N{WORD JOINER}")


def link(output: Output) -> str:
    """Return the link to a result: where it is kept, else the provider's URL."""
    return output.link(LONGEST_LINK) or "(a result that has no address)"


# --- Telegram's updates ---

Whole = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
"""A whole number; Telegram's ids have 52 bits at most."""


class Chat(msgspec.Struct):
    id: Whole
    type: str = "private"


class User(msgspec.Struct):
    id: Whole
    is_bot: bool = False


class File(msgspec.Struct):
    file_id: str
    file_size: Whole = 0
    mime_type: str = "image/jpeg"


class Entity(msgspec.Struct):
    type: str
    offset: Whole
    length: Whole


class Message(msgspec.Struct, rename={"by": "from"}):
    message_id: Whole
    chat: Chat
    date: Whole = 0
    by: User | None = None
    text: str = ""
    caption: str = ""
    entities: list[Entity] = []
    caption_entities: list[Entity] = []
    photo: list[File] = []
    document: File | None = None
    message_thread_id: Whole | None = None
    reply_to_message: "Message | None" = None
    via_bot: Any = None

    @property
    def words(self) -> str:
        return self.text or self.caption

    @property
    def slash(self) -> int:
        """Length of the command at the start of the message; 0 if there is none."""
        first = next(iter(self.entities or self.caption_entities), None)
        if first is None or first.type != "bot_command" or first.offset:
            return 0
        return max(first.length, 0)

    @property
    def command(self) -> tuple[str, str]:
        """The name of that command, and the bot that it addresses."""
        name, _, bot = self.words[1 : self.slash].partition("@")
        return name.lower(), bot.lower()

    @property
    def picture(self) -> File | None:
        """The picture in it, or in the message that it replies to."""
        small = [photo for photo in self.photo if photo.file_size <= MOST_PICTURE]
        if small:
            return small[-1]
        if self.document is not None and self.document.mime_type.startswith("image/"):
            return self.document
        return self.reply_to_message.picture if self.reply_to_message else None


class Query(msgspec.Struct, rename={"by": "from"}):
    id: str
    by: User
    data: str = ""
    message: Message | None = None


class Update(msgspec.Struct):
    message: Message | None = None
    callback_query: Query | None = None
