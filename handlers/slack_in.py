"""Take orders in Slack: slash commands, mentions, direct messages and buttons; answer them there.

Use: `SLACK_SIGNING_SECRET=… SLACK_TOKEN=xoxb-… receiver serve save slack-in`, with recipes.
`receiver chat slack` prints the manifest of an app that calls `/in/slack`.

An order is stored before Slack is answered. Its pictures are uploaded where it was ordered. If the
bot is not a member there, they are linked by the command's response_url, which is valid for 30
minutes, or else sent to the person directly. Only that person sees failures. A message that was
posted just before a crash is found again by its files; one without files may be posted twice.
"""

import asyncio
import hashlib
import hmac
import logging
import re
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
    Secret,
    Template,
    Unproved,
    on,
    read_settings,
    route,
)

from . import _chat as chat
from ._slack import (
    Envelope,
    Payload,
    Slack,
    Slash,
    UserMessage,
    actions,
    blocks_of,
    escape,
    is_for_us,
    link,
    section,
    shortened,
    unescape,
    without_mention,
)

TOLERANCE = 300  # seconds, either way
MOST_FETCH = 1.5  # seconds for an attached picture: Slack waits 3 for the answer
THREADS = r"\d+\.\d{6}"
people = partial(
    chat.read_ids, r"[UW][A-Z0-9]+", "must be ids of people like U0123456789, by comma"
)


def secrets(text: str) -> list[Secret]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found or not all(re.fullmatch(r"[!-~]{16,200}", one, re.ASCII) for one in found):
        raise ValueError("must be of 16 to 200 characters, or several such by comma, newest first")
    return [Secret(one) for one in found]


with read_settings() as read:
    SECRETS = read.parsed("SLACK_SIGNING_SECRET", "the app's signing secret", secrets)
    ADMINS = read.parsed("SLACK_ADMINS", "who may cancel what others ordered", people, default="")
    TOKEN = read.secret(
        "SLACK_TOKEN",
        "a bot's token (xoxb-…) with the scopes chat:write, files:write, files:read and im:write",
        r"xox[\w.-]+",
    )
    MOST_BYTES = read.size(
        "SLACK_MAX_BYTES", "the largest result to post; larger ones are linked", default="100MB"
    )
    URL = read.url(
        "SLACK_URL", "where Slack's API is", default="https://slack.com/api", secure=True
    )

SLACK = Slack(TOKEN, URL, MOST_BYTES)

WORDS = Template("<@{person}> {prompt:.1000}\n{text:.1200}", more=("person",))
HOOKS = ("https://hooks.slack.com/", "https://hooks.slack-gov.com/", SLACK.safe[1])
FILES = ("https://files.slack.com/", SLACK.safe[1])
logging.getLogger("httpx").setLevel(logging.WARNING)  # else it logs each response_url, a secret


class Origin(msgspec.Struct, frozen=True):
    """The person who ordered, the place, and how to answer."""

    team: str
    channel: str
    user: str
    thread: str = ""
    response_url: str = ""
    is_pressed: bool = False
    """Ordered by a button: response_url then edits the button's message, which must stay."""

    @property
    def who(self) -> chat.Who:
        person, place = f"slack:{self.team}/{self.user}", f"slack:{self.team}/{self.channel}"
        return chat.Who(person, place, self.user in ADMINS, self.channel.startswith("D"))

    @property
    def hook(self) -> str:
        """The response_url if it is an allowed address, else ''."""
        is_sound = re.fullmatch(r"[!-~]{1,2000}", self.response_url)
        return self.response_url if is_sound and self.response_url.startswith(HOOKS) else ""

    def extras(self, door: Door, recipe: str) -> dict[str, Any]:
        """Return the metadata and private values that the later answer needs."""
        metadata = {"answered_by": "slack-in", "slack_channel": self.channel}
        if self.thread:
            metadata["slack_thread"] = self.thread
        private: dict[str, Any] = {"labels": chat.labels(door, recipe)}
        if self.hook:
            private |= {"response_url": self.hook, "is_pressed": self.is_pressed}
        return {"metadata": metadata, "private": private}

    async def notify(
        self, http: httpx.AsyncClient, text: str, buttons: dict[str, str], *, replace: bool = False
    ) -> None:
        """Notify the person alone: by the response_url, else in the place, else directly."""
        message = ephemeral(text, buttons) | {"replace_original": replace}
        if self.hook:
            answer = await http.post(self.hook, json=message)
            if answer.is_success:
                return
        form = {"text": text, "blocks": chat.to_json(message["blocks"])}
        thread = {"thread_ts": self.thread} if self.thread else {}
        try:
            await SLACK.call(
                http, "chat.postEphemeral", channel=self.channel, user=self.user, **form, **thread
            )
        except Dead:
            await SLACK.call(http, "chat.postMessage", channel=await self.direct(http), **form)

    async def direct(self, http: httpx.AsyncClient) -> str:
        """Return the channel of direct messages between the person and the bot."""
        response = await SLACK.call(http, "conversations.open", users=self.user)
        return str(response.channel["id"])


def ephemeral(text: str, buttons: dict[str, str]) -> dict[str, Any]:
    blocks = [section(shortened(escape(text))), *actions(buttons)]
    return {"response_type": "ephemeral", "text": text, "blocks": blocks}


def prove(call: Call) -> None:
    stamp, given = call.header("x-slack-request-timestamp"), call.header("x-slack-signature")
    if not re.fullmatch(r"[0-9]{1,15}", stamp):
        raise Unproved("bad_timestamp")
    signed = b"v0:%b:%b" % (stamp.encode(), call.body)
    proofs = [
        "v0=" + hmac.digest(secret.reveal().encode(), signed, hashlib.sha256).hex()
        for secret in SECRETS
    ]
    found = [hmac.compare_digest(proof.encode(), given.encode()) for proof in proofs]
    if not any(found):
        raise Unproved("bad_signature")
    if abs(call.at - int(stamp)) > TOLERANCE:
        raise Unproved("stale")


@route("slack", proof=prove)
async def slack(call: Call, door: Door) -> Reply:
    if call.header("content-type").startswith("application/json"):
        return await on_message(call, door)
    form = call.form()
    if "payload" in form:
        return await on_button(read_as(Payload, decoded(form["payload"])), door)
    if "command" in form:
        return await on_command(read_as(Slash, form), door)
    return Reply.empty()  # ssl_check, and unknown types


def decoded(text: str) -> Any:
    return Call(body=text.encode()).json()


def read_as(kind: Any, value: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise Problem(400, "invalid-body", f"the body does not fit: {error}") from None


async def on_command(given: Slash, door: Door) -> Reply:
    """Order by a slash command; only the person who typed it sees the answer."""
    origin = Origin(given.team_id, given.channel_id, given.user_id, "", given.response_url)
    try:
        name = given.command.removeprefix("/").lower()
        command = chat.read(door, unescape(given.text), name)
        if command.help:
            return Reply.json(ephemeral(command.help, {}))
        key = f"{given.team_id}/{given.trigger_id}"
        prediction = await order(door, origin, command, key)
    except Problem as problem:
        return Reply.json(ephemeral(chat.refusal_text(problem), {}))
    return Reply.json(ephemeral(await chat.ack_text(door, prediction), cancel_of(door, prediction)))


async def on_message(call: Call, door: Door) -> Reply:
    """Order by a mention or a direct message."""
    envelope = call.json(Envelope)
    if envelope.type == "url_verification":
        return Reply.json({"challenge": envelope.challenge})
    if envelope.type == "app_rate_limited":
        door.log.warning("slack.rate_limited")
    if envelope.type != "event_callback" or not is_for_us(envelope.event):
        return Reply.empty()
    message: UserMessage = read_as(UserMessage, envelope.event)
    # An answer to a direct message needs no thread.
    thread = message.thread_ts or ("" if envelope.event["type"] == "message" else message.ts)
    team = envelope.team_id or ""
    origin = Origin(team, message.channel, message.user, thread)
    text = without_mention(message.text, envelope.authorizations or [])
    try:
        command = chat.read(door, unescape(text))
        if command.help:
            notify(door, origin, command.help)
            return Reply.empty()
        key = f"{team}/{message.channel}/{message.ts}"
        prediction = await order(
            door, origin, command, key, message.files, float(message.ts or call.at)
        )
    except Problem as problem:
        notify(door, origin, chat.refusal_text(problem))
        return Reply.empty()
    # Slack repeats what was refused as well: only an order that was stored before has its answer.
    is_old = prediction.created_at.timestamp() < call.at - 1
    if chat.is_first(prediction.id) and not is_old:
        words = await chat.ack_text(door, prediction)
        notify(door, origin, words, cancel_of(door, prediction))
    return Reply.empty()


async def on_button(payload: Payload, door: Door) -> Reply:
    """Act on a button; the answer goes to its response_url."""
    if payload.type != "block_actions" or not payload.actions or payload.user is None:
        return Reply.empty()
    channel = payload.channel.id if payload.channel else ""
    team = str((payload.team or {}).get("id", ""))
    thread = payload.container.thread_ts
    origin = Origin(team, channel, payload.user.id, thread, payload.response_url, is_pressed=True)
    try:
        press = chat.read_press(door, payload.actions[0].value)
        key = f"{team}/{payload.trigger_id}"
        prediction = await chat.act(door, press, origin.who, key, partial(origin.extras, door))
    except Problem as problem:
        notify(door, origin, chat.refusal_text(problem))
        return Reply.empty()
    if prediction is not None:
        words = await chat.ack_text(door, prediction)
        notify(door, origin, words, cancel_of(door, prediction))
    elif press.action == chat.CANCEL:
        send = partial(origin.notify, door.http, buttons={})
        door.later(chat.best_effort(door, chat.cancel(door, press.prediction_id, send)))
    else:
        door.later(chat.best_effort(door, remove(door, origin, payload.container.message_ts)))
    return Reply.empty()


async def remove(door: Door, origin: Origin, ts: str) -> None:
    """Delete the message of a button, by the response_url if the bot is not a member there."""
    try:
        await SLACK.call(door.http, "chat.delete", channel=origin.channel, ts=ts)
    except Dead:
        if origin.hook:
            await door.http.post(origin.hook, json={"delete_original": True})


async def order(
    door: Door,
    origin: Origin,
    command: Any,
    key: str,
    files: list[dict[str, Any]] | None = None,
    at: float | None = None,
) -> Prediction:
    """Order; an attached picture goes to the first option that takes one."""
    options = dict(command.options)
    urls = [str(file.get("url_private_download", "")) for file in files or []]
    wanted = chat.picture_option(door, command.recipe, options)
    if wanted and urls and urls[0].startswith(FILES):
        token = {"authorization": f"Bearer {TOKEN.reveal()}"}
        try:
            async with asyncio.timeout(MOST_FETCH):
                options[wanted] = await chat.picture(door, urls[0], token)
        except TimeoutError:
            raise chat.not_fetched("it took too long") from None
    who = origin.who
    return await door.order(
        command.recipe,
        options,
        key=key,
        person=who.person,
        place=who.place,
        at=at,
        **origin.extras(door, command.recipe),
    )


def cancel_of(door: Door, prediction: Prediction) -> dict[str, str]:
    if prediction.status in chat.FINAL:
        return {}
    return {chat.LABELS[chat.CANCEL]: chat.button(door.sign, chat.CANCEL, prediction.id)}


def notify(door: Door, origin: Origin, text: str, buttons: dict[str, str] | None = None) -> None:
    door.later(chat.best_effort(door, origin.notify(door.http, text, buttons or {})))


# --- answers ---


@on("*", name="slack-in", metadata={"answered_by": "slack-in"}, timeout=600, after="save")
async def answer(event: Event, ctx: Context) -> None:
    prediction, user = event.prediction, chat.user_of(event, "in/slack")
    team = ((prediction.order and prediction.order.place) or "").partition(":")[2].partition("/")[0]
    channel, thread = (
        prediction.named("slack_channel", r"\w+"),
        prediction.named("slack_thread", THREADS),
    )
    url, is_pressed = ctx.private.get("response_url", ""), ctx.private.get("is_pressed", False)
    origin = Origin(team, channel, user, thread, url, is_pressed)
    labels = ctx.private.get("labels", [])
    if event.type != "prediction.succeeded":
        buttons = chat.result_buttons(ctx.sign, prediction.id, [])
        send = partial(
            origin.notify, ctx.http, chat.failure_text(event), buttons, replace=not is_pressed
        )
        await ctx.once("tell", send)
        return
    buttons = chat.result_buttons(ctx.sign, prediction.id, labels, chat.DELETE)
    files: list[Any] = []
    links = [link(one) for one in prediction.output or [] if one.url]
    if not prediction.flagged:  # Slack cannot hide a picture: a flagged one is only linked
        files, links = await SLACK.files(event, ctx)
    await ctx.once("post", partial(show, event, ctx, origin, files, links, buttons))


async def show(
    event: Event,
    ctx: Context,
    origin: Origin,
    files: list[Any],
    links: list[str],
    buttons: dict[str, str],
) -> None:
    """Post where it was ordered; else links by the response_url; else directly."""
    if ctx.attempt > 1 and await SLACK.is_posted(ctx.http, files):
        return
    filled = WORDS.fill(event, escape, {"person": origin.user})
    text = shortened(event.prediction.warning(escape) + filled.strip())
    blocks = [*blocks_of(event, text, links), *actions(buttons)]
    post = partial(SLACK.post, ctx.http, previews=not event.prediction.flagged)
    try:
        await post(origin.channel, origin.thread, text, blocks, files)
    except Dead as refused:
        ctx.log.info("slack.fallback", reason=str(refused))
        if await post_links(event, ctx, origin, text, buttons):
            return
        place = await origin.direct(ctx.http)
        await post(place, "", text, blocks, files)


async def post_links(
    event: Event, ctx: Context, origin: Origin, text: str, buttons: dict[str, str]
) -> bool:
    """Post links that all can see by the response_url; return whether Slack accepted them."""
    outputs = [output for output in event.prediction.output or [] if output.url]
    if not origin.hook or not all(output.link(2900) for output in outputs):
        return False
    blocks = [*blocks_of(event, text, [link(one) for one in outputs]), *actions(buttons)]
    unfurls = {"unfurl_media": not event.prediction.flagged}
    message = {"response_type": "in_channel", "text": text, "blocks": blocks, **unfurls}
    response = await ctx.http.post(origin.hook, json=message | {"replace_original": False})
    return response.is_success
