"""Take orders in Telegram: commands, replies and buttons, pushed or polled; answer them there.

Use: `TELEGRAM_TOKEN=123:… receiver serve save telegram-in`, with recipes. `receiver chat telegram`
sets the webhook `/in/telegram` and the menu of commands. Without a public address:
`TELEGRAM_POLL=1`, after `receiver chat telegram --poll`.

An order is stored before Telegram is answered. Pictures are sent as the reply to the message; if
the bot may no longer write there, to the person directly. Telegram has no messages for one person
in a group: failures are sent directly if the person has begun a chat with the bot, else as a reply.
Telegram does not detect repeats: a message may be sent twice if Telegram's answer was lost.
"""

import hmac
import logging
import re
import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

import httpx
import msgspec

from receiver import (
    Call,
    Context,
    Dead,
    Door,
    Event,
    Prediction,
    Problem,
    Reply,
    Retry,
    Template,
    Unproved,
    cut,
    on,
    read_settings,
    route,
    source,
)

from . import _chat as chat
from ._telegram import (
    ID,
    Chat,
    File,
    Message,
    Query,
    Telegram,
    Update,
    User,
    address,
    answering,
    clean,
    keyboard,
    with_links,
)

SECRET = "x-telegram-bot-api-secret-token"  # noqa: S105 - the name of a header
UPDATES = ["message", "callback_query"]
WAIT = 50  # seconds that a poll waits for updates
LONGEST_ALERT = 200
WORDS = Template("{prompt:.500}\n{text:.3000}")
people = partial(chat.read_ids, r"\d{1,20}", "must be ids of people, digits, by comma")


with read_settings() as read:
    TOKEN = read.secret(
        "TELEGRAM_TOKEN", "a bot's token like 123456:ABC…, from BotFather", r"\d+:[\w-]+"
    )
    ADMINS = read.parsed(
        "TELEGRAM_ADMINS", "who may cancel what others ordered", people, default=""
    )
    POLL = read.switch("TELEGRAM_POLL", "whether to ask for updates, without a public address")
    MOST_BYTES = read.size(
        "TELEGRAM_MAX_BYTES", "the largest result to post; larger ones are linked", default="50MB"
    )
    URL = read.url(
        "TELEGRAM_URL", "where the Bot API is", default="https://api.telegram.org", secure=True
    )

TELEGRAM = Telegram(TOKEN, URL, MOST_BYTES)

BOT = TOKEN.reveal().partition(":")[0]
logging.getLogger("httpx").setLevel(logging.WARNING)  # else it logs addresses, with the token


def prove(call: Call, door: Door) -> None:
    given = call.header(SECRET).encode()
    found = [hmac.compare_digest(one.encode(), given) for one in door.secrets("telegram-webhook")]
    if not any(found):
        raise Unproved("bad_secret")


@route("telegram", proof=prove, timeout=30)
async def telegram(call: Call, door: Door) -> Reply:
    update = call.json(Update)
    if update.callback_query is not None:
        return await on_button(update.callback_query, door)
    if update.message is not None:
        return await on_message(update.message, door)
    return Reply.empty()


async def on_message(message: Message, door: Door) -> Reply:
    """Order by a message; the response is a method call, whose result is not sent to us."""
    user = message.by
    if user is None or user.is_bot or message.via_bot or not await is_for_us(message, door):
        return Reply.empty()
    who = who_of(user, message.chat)
    name, text = message.command[0], message.words[message.slash :]
    if name == "start":  # text after it comes from a link, not for a recipe
        name, text = "help", ""
    try:
        is_other = name and not is_recipe(name, door)  # help, or an unknown command
        command = door.command(name + text) if is_other else chat.read(door, text, name)
        if command.help:
            return text_reply(message, command.help)
        options = dict(command.options)
        wanted = chat.picture_option(door, command.recipe, options)
        if wanted and message.picture is not None:
            options[wanted] = await picture(door, message.picture)
        prediction = await door.order(
            command.recipe,
            options,
            key=f"{BOT}/{message.chat.id}/{message.message_id}",
            person=who.person,
            place=who.place,
            at=float(message.date or time.time()),
            **extras(message, door, command.recipe),
        )
    except Problem as problem:
        return text_reply(message, chat.refusal_text(problem))
    await acknowledge(message, door, prediction)
    return call_reply("sendChatAction", chat_id=message.chat.id, action="upload_photo")


async def is_for_us(message: Message, door: Door) -> bool:
    """Return whether a message is a command for the bot, a reply to it, or sent to it alone."""
    name, bot = message.command
    if bot:
        return bot == (await own_name(door)).lower()
    if message.chat.type == "private":
        return bool(message.words)
    if name:  # /start, /help and what is no recipe are for every bot of the group, or for another
        return is_recipe(name, door)
    answered = message.reply_to_message
    is_to_us = answered is not None and answered.by is not None and str(answered.by.id) == BOT
    return is_to_us and bool(message.words)


def is_recipe(name: str, door: Door) -> bool:
    return any(one.name == name for one in door.recipes())


NAMES: dict[str, str] = {}


async def own_name(door: Door) -> str:
    """Return the bot's name, which is requested once."""
    if "me" not in NAMES:
        try:
            NAMES["me"] = (await TELEGRAM.call(door.http, "getMe"))["username"]
        except (Dead, Retry, httpx.HTTPError) as error:
            raise Problem(503, "unavailable", f"Telegram does not answer: {error}") from None
    return NAMES["me"]


def who_of(user: User, where: Chat) -> chat.Who:
    person, place = f"telegram:{user.id}", f"telegram:{where.id}"
    return chat.Who(person, place, str(user.id) in ADMINS, is_direct=where.type == "private")


def extras(message: Message, door: Door, recipe: str) -> dict[str, Any]:
    """Return the metadata and private values that the later answer needs."""
    metadata: dict[str, Any] = {
        "answered_by": "telegram-in",
        "telegram_chat": str(message.chat.id),
        "telegram_message": str(message.message_id),
    }
    if message.message_thread_id is not None:
        metadata["telegram_thread"] = str(message.message_thread_id)
    return {"metadata": metadata, "private": {"labels": chat.labels(door, recipe)}}


async def picture(door: Door, file: File) -> str:
    """Fetch a picture; its URL contains our token and must not be passed on."""
    try:
        found = await TELEGRAM.call(door.http, "getFile", file_id=file.file_id)
    except (Dead, Retry, httpx.HTTPError) as error:
        raise chat.not_fetched(str(error)) from None
    path = str(found.get("file_path", ""))
    if not re.fullmatch(r"[\w./-]+", path, re.ASCII) or ".." in path:
        raise chat.not_fetched("it has no address")
    return await chat.picture(door, f"{URL}/file/bot{TOKEN.reveal()}/{path}")


async def acknowledge(message: Message, door: Door, prediction: Prediction) -> None:
    """Acknowledge an order once, by a message that is deleted after the outcome."""
    if prediction.status in chat.FINAL or "telegram_acknowledgement" in prediction.metadata:
        return
    if not chat.is_first(prediction.id):
        return
    text = await chat.ack_text(door, prediction)
    door.later(chat.best_effort(door, send_ack(message, door, prediction.id, text)))


async def send_ack(message: Message, door: Door, prediction_id: str, text: str) -> None:
    cancel = {"Cancel": chat.button(door.sign, chat.CANCEL, prediction_id)}
    sent = await TELEGRAM.call(
        door.http, "sendMessage", **reply_to(message), text=text, **keyboard(cancel)
    )
    await door.annotate(prediction_id, telegram_acknowledgement=str(sent["message_id"]))


def reply_to(message: Message) -> dict[str, Any]:
    form = {"chat_id": message.chat.id, "reply_parameters": answering(message.message_id)}
    thread = message.message_thread_id
    return form if thread is None else {**form, "message_thread_id": thread}


def call_reply(method: str, **given: Any) -> Reply:
    return Reply.json({"method": method, **given})


def text_reply(message: Message, text: str) -> Reply:
    form = reply_to(message) | {"reply_parameters": {"message_id": message.message_id}}
    return call_reply("sendMessage", **form, text=with_links(text, []))


async def on_button(query: Query, door: Door) -> Reply:
    """Act on a button; only the person who pressed it sees the answer."""
    if query.message is None:
        return alert(query, "This is too old.")
    where = query.message.chat
    who = who_of(query.by, where)
    try:
        press = chat.read_press(door, query.data)
        more = partial(extras, query.message, door)
        prediction = await chat.act(door, press, who, f"{BOT}/{query.id}", more)
    except Problem as problem:
        return alert(query, chat.refusal_text(problem))
    if prediction is not None:
        await acknowledge(query.message, door, prediction)
        return alert(query, await chat.ack_text(door, prediction), loud=False)
    if press.action == chat.CANCEL:
        send_text = partial(send_reply, door, query.message)
        door.later(chat.best_effort(door, chat.cancel(door, press.prediction_id, send_text)))
    else:
        gone = {"chat_id": where.id, "message_id": query.message.message_id}
        door.later(chat.best_effort(door, TELEGRAM.call(door.http, "deleteMessage", **gone)))
    return alert(query, "", loud=False)


async def send_reply(door: Door, message: Message, text: str) -> None:
    await TELEGRAM.call(door.http, "sendMessage", **reply_to(message), text=text)


def alert(query: Query, text: str, *, loud: bool = True) -> Reply:
    words = cut(text, LONGEST_ALERT, utf16=True)
    return call_reply(
        "answerCallbackQuery", callback_query_id=query.id, text=words, show_alert=loud
    )


# --- polling ---


async def poll(door: Door) -> AsyncGenerator[Call, Reply]:
    """Poll for updates; the next poll confirms the answered ones."""
    offset = 0
    while True:
        params = {"offset": offset, "timeout": WAIT, "allowed_updates": UPDATES}
        for update in await TELEGRAM.call(door.http, "getUpdates", **params):
            body = msgspec.json.encode(update)
            kind = {"content-type": "application/json"}
            reply = yield Call(body=body, headers=kind, at=time.time())
            if reply.status >= httpx.codes.INTERNAL_SERVER_ERROR:
                return  # the source is restarted in a moment, with the same update
            offset = int(update["update_id"]) + 1
            await chat.best_effort(door, do(door, reply))


async def do(door: Door, reply: Reply) -> None:
    """Make the method call that a reply contains."""
    if reply.body and reply.status == httpx.codes.OK:
        form = msgspec.json.decode(reply.body, type=dict[str, Any])
        await TELEGRAM.call(door.http, form.pop("method"), **form)


if POLL:
    poll = source("telegram")(poll)


# --- answers ---


@on("*", name="telegram-in", metadata={"answered_by": "telegram-in"}, timeout=900, after="save")
async def answer(event: Event, ctx: Context) -> None:
    user = chat.user_of(event, "in/telegram")
    if event.type == "prediction.succeeded":
        await show(event, ctx, user)
    else:
        await ctx.once("tell", partial(notify, event, ctx, user))
    await ctx.once("clean", partial(clean_up, event, ctx))


async def show(event: Event, ctx: Context, user: str) -> None:
    """Send all messages, each once."""
    parts, links = await TELEGRAM.parts(event, ctx, flagged=bool(event.prediction.flagged))
    labels = ctx.private.get("labels", [])
    buttons = chat.result_buttons(ctx.sign, event.prediction.id, labels, chat.DELETE)
    filled = event.prediction.warning(clean) + WORDS.fill(event, clean).strip()
    text, markup = with_links(filled or event.type, links, len(event.type)), keyboard(buttons)
    # Albums have no buttons: these then go under a text message.
    for key, some in TELEGRAM.messages(parts, bool(links) or len(parts) > 1).items():
        form = address(event, user) | markup
        await ctx.once(key, partial(send, ctx, form, user, some, text))
        text, markup = "", {}


async def send(ctx: Context, form: dict[str, str], user: str, parts: list[Any], text: str) -> None:
    """Send a message where it was ordered, or else directly."""
    try:
        await TELEGRAM.deliver(ctx.http, form, parts, text)
    except Dead as refused:
        if form["chat_id"] == user:
            raise
        ctx.log.info("telegram.fallback", reason=str(refused))
        only = {"chat_id": user} | {k: v for k, v in form.items() if k == "reply_markup"}
        await TELEGRAM.deliver(ctx.http, only, parts, text)


async def notify(event: Event, ctx: Context, user: str) -> None:
    """Send the person the reason for a missing picture: directly, or else as a reply."""
    text = chat.failure_text(event)
    buttons = keyboard(chat.result_buttons(ctx.sign, event.prediction.id, []))
    form = address(event, user) | buttons
    ways = [form] if form["chat_id"] == user else [{"chat_id": user} | buttons, form]
    try:
        await TELEGRAM.deliver(ctx.http, ways[0], [], text)
    except Dead:
        if len(ways) == 1:
            raise
        await TELEGRAM.deliver(ctx.http, ways[1], [], text)


async def clean_up(event: Event, ctx: Context) -> None:
    """Delete the acknowledgement, if possible."""
    form = {
        "chat_id": event.prediction.named("telegram_chat", r"-?\d{1,20}"),
        "message_id": event.prediction.named("telegram_acknowledgement", ID),
    }
    if all(form.values()):
        await TELEGRAM.post(ctx.http, "deleteMessage", form, {})
