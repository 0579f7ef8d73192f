"""Slack's JSON of messages and files."""

from __future__ import annotations

from typing import Any, Final

from receiver.emulator.chats.board import BOT, File, Message
from receiver.emulator.chats.slack.blocks import Blocks

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


def fill(message: Message, blocks: Blocks, text: str) -> None:
    """Set the content of a message from blocks; its uploaded files stay."""
    message.text = blocks.text or text
    message.buttons = blocks.buttons
    message.raw = {"text": text, "blocks": blocks.blocks}
    message.files = [*(file for file in message.files if file.content), *blocks.pictures]
