"""Slack's Web API for bots: `{"ok": false, "error": …}` for all that is documented as invalid.

Every channel whose id begins with C, G or D exists, and the bot is in all of them but `outside`.
Like Slack, it redirects a download without the bot's token to a login page.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from receiver.emulator import wire
from receiver.emulator.chats import forms
from receiver.emulator.chats.board import BOT, Board, File, Message, kind_of
from receiver.emulator.chats.forms import Given, Unreadable
from receiver.emulator.chats.scene import Scene
from receiver.emulator.chats.slack.blocks import Problem, read_blocks
from receiver.emulator.chats.slack.messages import BOT_ID, BOT_USER, file_json, to_json

TOKEN: Final = "xoxb-emulated"  # noqa: S105 - valid only in the emulator
TEAM, APP = "T01", "A01"
SCOPES: Final = "app_mentions:read,chat:write,commands,files:read,files:write,im:history,im:write"
URL_LIVES: Final = 1800.0
URL_USES: Final = 5
LONGEST: Final = 40_000
_CHANNEL = re.compile(r"[CGD][A-Z0-9]+")
_TS = re.compile(r"\d{10}\.\d{6}")


@dataclass
class ResponseUrl:
    """A URL that answers a command or a button without a token, 5 times within 30 minutes."""

    place: str
    person: str
    thread: str
    made_at: float
    original: Message | None = None
    """What `replace_original` replaces: the button's message, or the answer to the command."""
    uses: int = 0


@dataclass
class PendingUpload:
    """An announced file; `file` is None until it is uploaded."""

    name: str
    length: int
    file: File | None = None
    shares: dict[str, str] = field(default_factory=dict)
    """Ids of the messages that contain it, by channel."""


@dataclass(frozen=True)
class Method:
    """One call of the Web API."""

    work: Callable[[Given, str], dict[str, Any]]
    scope: str = ""
    needs: tuple[str, ...] = ()
    takes_json: bool = True


@dataclass
class Slack:
    """The API under `/slack`; the module `people` calls the app."""

    scene: Scene
    board: Board = field(default_factory=lambda: Board("slack"))
    scopes: str = SCOPES
    outside: set[str] = field(default_factory=set)
    """Channels of which the bot is not a member."""
    are_urls_dead: bool = False
    """Whether every response_url is refused as expired."""
    urls: dict[str, ResponseUrl] = field(default_factory=dict)
    uploads: dict[str, PendingUpload] = field(default_factory=dict)

    def routes(self) -> list[Route]:
        api, both = "/slack/api/{method}", ("GET", "POST")
        upload, url = "/slack/upload/{id}", "/slack/response/{id}"
        return [
            self.scene.route("slack", api, self._called, _limited, methods=both),
            self.scene.route("slack", upload, self._receive_upload, _limited, "upload"),
            self.scene.route("slack", url, self._responded, _limited, "response_url"),
            Route("/slack/files/{id}/{name}", self._download),
        ]

    def ts(self) -> str:
        """Return a unique `ts`, the time by which Slack identifies a message."""
        return f"{int(self.scene.now()):010d}.{self.scene.number():06d}"

    def response_url(self, origin: str, url: ResponseUrl) -> str:
        name = f"{TEAM}-{self.scene.number()}"
        self.urls[name] = url
        return f"{origin}/slack/response/{name}"

    # --- the Web API ---

    async def _called(self, request: Request) -> Response:
        headers = {"x-oauth-scopes": self.scopes, "x-accepted-oauth-scopes": ""}
        try:
            found = self._answer(request, await forms.read(request))
        except Unreadable:
            found = Problem("invalid_json").answer
        except Problem as problem:
            found = problem.answer
        except forms.WRONG_SHAPE:
            found = Problem("invalid_arguments").answer
        return wire.answer(found, headers=headers)

    def _answer(self, request: Request, given: Given) -> dict[str, Any]:
        method = self._methods.get(request.path_params["method"])
        if method is None:
            raise Problem("unknown_method", req_method=request.path_params["method"])
        if given.document is not None and not method.takes_json:
            given = Given(dict(request.query_params))
        token = wire.credential(request, "Bearer") or given.text("token")
        if token != TOKEN:
            raise Problem("invalid_auth" if token else "not_authed")
        if method.scope and method.scope not in self.scopes.split(","):
            raise Problem("missing_scope", needed=method.scope, provided=self.scopes)
        missing = [name for name in method.needs if not given.args.get(name)]
        if missing:
            words = [f"[ERROR] missing required field: {name}" for name in missing]
            raise Problem("invalid_arguments", response_metadata={"messages": words})
        return {"ok": True, **method.work(given, wire.origin(request))}

    @cached_property
    def _methods(self) -> dict[str, Method]:
        return {
            "auth.test": Method(self._auth_test),
            "chat.postMessage": Method(self._post_message, "chat:write", ("channel",)),
            "chat.postEphemeral": Method(self._post_ephemeral, "chat:write", ("channel", "user")),
            "chat.update": Method(self._update, "chat:write", ("channel", "ts")),
            "chat.delete": Method(self._delete, "chat:write", ("channel", "ts")),
            "conversations.open": Method(self._open, "im:write", ("users",)),
            "files.getUploadURLExternal": Method(
                self._start_upload, "files:write", ("filename", "length"), takes_json=False
            ),
            "files.completeUploadExternal": Method(self._complete, "files:write", ("files",)),
            "files.info": Method(self._file, "files:read", ("file",), takes_json=False),
        }

    def _auth_test(self, _given: Given, origin: str) -> dict[str, Any]:
        names = {"team": "Emulated", "user": "imagine", "team_id": TEAM, "user_id": BOT_USER}
        return {"url": f"{origin}/", **names, "bot_id": BOT_ID, "is_enterprise_install": False}

    def _place(self, given: Given) -> str:
        """Return the channel of a call; a person's id means their direct conversation."""
        place = given.text("channel")
        if place[:1] in {"U", "W"}:
            return "D" + place[1:]
        if not _CHANNEL.fullmatch(place):
            raise Problem("channel_not_found")
        if place in self.outside:
            raise Problem("not_in_channel")
        return place

    def _fill(
        self, message: Message, given: Given, text: str, *, needs_text: bool = True
    ) -> Message:
        """Set the content of a message; raise Problem if it is invalid; uploaded files stay."""
        blocks = given.value("blocks")
        if blocks is None and needs_text and not text:
            raise Problem("no_text")
        if len(text) > LONGEST:
            raise Problem("msg_too_long")
        thread = given.text("thread_ts")
        if thread and not _TS.fullmatch(thread):
            raise Problem("invalid_thread_ts")
        content = read_blocks(blocks, text)
        message.text, message.buttons = content.text or text, content.buttons
        message.raw = {"text": text, "blocks": content.blocks}
        message.files = [*(file for file in message.files if file.content), *content.pictures]
        return message

    def _posted(self, given: Given, place: str, **more: Any) -> Message:
        message = Message(self.ts(), place, BOT, thread=given.text("thread_ts"), **more)
        return self.board.post(self._fill(message, given, given.text("text")))

    def _post_message(self, given: Given, _origin: str) -> dict[str, Any]:
        place = self._place(given)
        message = self._posted(given, place, by="chat.postMessage")
        return {"channel": place, "ts": message.id, "message": to_json(message)}

    def _post_ephemeral(self, given: Given, _origin: str) -> dict[str, Any]:
        place, person = self._place(given), given.text("user")
        if not re.fullmatch(r"[UW][A-Z0-9]+", person):
            raise Problem("user_not_in_channel")
        message = self._posted(given, place, by="chat.postEphemeral", only_for=person)
        return {"message_ts": message.id}

    def _bot_message(self, given: Given, refusal: str) -> Message:
        """Return a bot's message that all can see; raise Problem, as no other can be changed."""
        message = self.board.find(self._place(given), given.text("ts"))
        if message is None or message.only_for:
            raise Problem("message_not_found")
        if message.author != BOT:
            raise Problem(refusal)
        return message

    def _update(self, given: Given, _origin: str) -> dict[str, Any]:
        message = self._bot_message(given, "cant_update_message")
        self.board.edit(self._fill(message, given, given.text("text")))
        about = {"text": given.text("text"), "message": to_json(message)}
        return {"channel": message.place, "ts": message.id, **about}

    def _delete(self, given: Given, _origin: str) -> dict[str, Any]:
        message = self._bot_message(given, "cant_delete_message")
        self.board.delete(message)
        return {"channel": message.place, "ts": message.id}

    def _open(self, given: Given, _origin: str) -> dict[str, Any]:
        person = given.text("users").partition(",")[0]
        if not re.fullmatch(r"[UW][A-Z0-9]+", person):
            raise Problem("user_not_found")
        return {"channel": {"id": "D" + person[1:]}}

    # --- files ---

    def _start_upload(self, given: Given, origin: str) -> dict[str, Any]:
        length = given.text("length")
        if not length.isdecimal() or not int(length):
            raise Problem("invalid_arguments")
        name = f"F{self.scene.number():06d}"
        self.uploads[name] = PendingUpload(given.text("filename"), int(length))
        return {"upload_url": f"{origin}/slack/upload/{name}", "file_id": name}

    async def _receive_upload(self, request: Request) -> Response:
        name, content = request.path_params["id"], await request.body()
        pending = self.uploads.get(name)
        if pending is None:
            return Response("no such upload", 404)
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            content = next(iter((await forms.read(request)).files.values())).content
        if len(content) != pending.length:
            return Response(f"{pending.length} bytes were promised", 400)
        self.keep(wire.origin(request), name, pending.name, content)
        return Response(f"OK - {len(content)}")

    def keep(self, origin: str, file_id: str, name: str, content: bytes) -> File:
        """Store a file under a URL that requires the bot's token."""
        url = f"{origin}/slack/files/{file_id}/{name}"
        file = File(file_id, name, kind_of(name), content, url)
        self.uploads[file_id] = PendingUpload(name, len(content), file)
        return file

    def _complete(self, given: Given, _origin: str) -> dict[str, Any]:
        named = given.value("files")
        if not isinstance(named, list) or not named:
            raise Problem("invalid_arguments")
        files = [self._uploaded(one) for one in named]
        if channel := given.text("channel_id") or given.text("channels"):
            place = self._place(Given({"channel": channel}))
            thread, text = given.text("thread_ts"), given.text("initial_comment")
            message = Message(self.ts(), place, BOT, thread=thread, files=files, by="files")
            self.board.post(self._fill(message, given, text, needs_text=False))
            for file in files:
                self.uploads[file.id].shares[place] = message.id
        return {"files": [{"id": file.id, "title": file.name} for file in files]}

    def _uploaded(self, named: Any) -> File:
        pending = self.uploads.get(named.get("id", "")) if isinstance(named, dict) else None
        if pending is None or pending.file is None:
            raise Problem("file_not_found")
        return pending.file

    def _file(self, given: Given, _origin: str) -> dict[str, Any]:
        file = self._uploaded({"id": given.text("file")})
        shares = {place: [{"ts": ts}] for place, ts in self.uploads[file.id].shares.items()}
        return {"file": file_json(file) | ({"shares": {"public": shares}} if shares else {})}

    async def _download(self, request: Request) -> Response:
        pending = self.uploads.get(request.path_params["id"])
        if wire.credential(request, "Bearer") != TOKEN:
            return RedirectResponse("/slack/login", 302)
        if pending is None or pending.file is None:
            return Response(status_code=404)
        return Response(pending.file.content, media_type=pending.file.content_type)

    # --- response_url ---

    async def _responded(self, request: Request) -> Response:
        url = self.urls.get(request.path_params["id"])
        is_old = url is not None and self.scene.now() - url.made_at > URL_LIVES
        if url is None or is_old or self.are_urls_dead:
            return wire.answer(Problem("expired_url").answer, 404)
        if url.uses >= URL_USES:
            return wire.answer(Problem("used_url").answer, 404)
        try:
            self.answer(url, forms.read_json(await request.body()))
        except Unreadable:
            return wire.answer(Problem("invalid_payload").answer, 400)
        except Problem as problem:
            return wire.answer(problem.answer, 400)
        url.uses += 1
        return Response("ok", media_type="text/plain")

    def answer(self, url: ResponseUrl, body: Any, by: str = "response_url") -> None:
        """Show the answer to a command or a button, from the response or the response_url."""
        if not isinstance(body, dict):
            raise Problem("invalid_payload")
        given, original = Given(body), url.original
        if given.flag("delete_original"):
            if original is not None:
                self.board.delete(original)
            return
        text = given.text("text")
        if given.flag("replace_original") and original is not None:
            self.board.edit(self._fill(original, given, text))
            return
        is_public = given.text("response_type") == "in_channel"
        thread = given.text("thread_ts") or url.thread
        message = Message(self.ts(), url.place, BOT, thread=thread, by=by)
        message.only_for = "" if is_public else url.person
        self.board.post(self._fill(message, given, text))
        url.original = original or message


def _limited(seconds: int) -> Response:
    headers = {"retry-after": str(seconds)}
    return wire.answer(Problem("ratelimited").answer, 429, headers)
