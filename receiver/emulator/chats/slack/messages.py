"""Slack's JSON of messages and files."""

from __future__ import annotations

from typing import Any, Final

from receiver.emulator.chats.board import BOT, File, Message

BOT_USER: Final = "UBOT"
BOT_ID: Final = "B01"


def to_json(message: Message) -> dict[str, Any]:
    """Return Slack's JSON of a message."""
    who = (
        {"user": BOT_USER, "bot_id": BOT_ID} if message.author == BOT else {"user": message.author}
    )
    thread = {"thread_ts": message.thread} if message.thread else {}
    return {"type": "message", "ts": message.id, **who, **thread, **message.raw}


def file_json(file: File) -> dict[str, Any]:
    """Return Slack's JSON of a file."""
    about = {"id": file.id, "name": file.name, "mimetype": file.content_type}
    where = {"url_private": file.url, "url_private_download": file.url}
    return {**about, "size": len(file.content), "mode": "hosted", **where}
