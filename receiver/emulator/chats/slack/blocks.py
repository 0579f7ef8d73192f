"""Slack's blocks: their limits, and the content that a person sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from receiver.emulator.chats.board import Button, File, kind_of

MOST: Final = 50
MOST_BUTTONS: Final = 25
KINDS: Final = {"section", "context", "actions", "image", "divider", "header", "markdown"}
LONGEST: Final[Mapping[str, int]] = {
    "section": 3000,
    "header": 150,
    "context": 3000,
    "action_id": 255,
    "value": 2000,
    "label": 75,
    "image_url": 3000,
    "alt_text": 2000,
    "markdown": 12_000,
}


class Problem(Exception):
    """An error that ends a call."""

    def __init__(self, error: str, **more: Any) -> None:
        super().__init__(error)
        self.answer = {"ok": False, "error": error, **more}


class InvalidBlocks(Problem):
    """The error `invalid_blocks`, with its reason."""

    def __init__(self, reason: str) -> None:
        messages = {"messages": [f"[ERROR] {reason}"]}
        super().__init__("invalid_blocks", response_metadata=messages)
        self.args = (reason,)


@dataclass
class Blocks:
    """The visible content of blocks."""

    text: str = ""
    buttons: list[Button] = field(default_factory=list)
    pictures: list[File] = field(default_factory=list)
    blocks: list[Any] = field(default_factory=list)


def read_blocks(given: Any, text: str) -> Blocks:
    """Return the visible content of blocks, or the text without any; raise InvalidBlocks."""
    if not given:
        return Blocks(text)
    if not isinstance(given, list) or len(given) > MOST:
        raise InvalidBlocks(f"no list of at most {MOST} blocks")
    content = Blocks(blocks=given)
    lines = [line for block in given for line in _read(block, content)]
    content.text = "\n".join(line for line in lines if line)
    return content


def _read(block: Any, content: Blocks) -> list[str]:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind not in KINDS:
        raise InvalidBlocks(f"unsupported type: {kind}")
    if kind == "divider":
        return []
    if kind == "image":
        content.pictures.append(_picture(block))
        return []
    if kind == "markdown":
        return [_short(block.get("text"), "markdown")]
    elements = block.get("elements", []) if kind in {"context", "actions"} else []
    if kind in {"context", "actions"} and not 0 < len(elements) <= MOST_BUTTONS:
        raise InvalidBlocks(f"{kind} has 1 to {MOST_BUTTONS} elements")
    if kind == "actions":
        content.buttons += [_button(element) for element in elements if _is_button(element)]
        return []
    if kind == "context":
        content.pictures += [_picture(one) for one in elements if one.get("type") == "image"]
        return [_text(one, kind) for one in elements if one.get("type") != "image"]
    if kind == "section" and _is_button(block.get("accessory")):
        content.buttons.append(_button(block["accessory"]))
    fields = [_text(one, "section") for one in block.get("fields", [])]
    texts = [_text(block.get("text"), kind)] if "text" in block or not fields else []
    return [*texts, *fields]


def _is_button(element: Any) -> bool:
    return isinstance(element, dict) and element.get("type") == "button"


def _button(element: dict[str, Any]) -> Button:
    text = _text(element.get("text"), "label")
    value = _short(element.get("value", ""), "value", least=0)
    action = _short(element.get("action_id", ""), "action_id", least=0)
    return Button(text, value, action, str(element.get("url", "")))


def _picture(element: dict[str, Any]) -> File:
    url = _short(element.get("image_url"), "image_url")
    _short(element.get("alt_text"), "alt_text", least=0)
    return File("", url.rpartition("/")[2], kind_of(url.partition("?")[0], "image/png"), b"", url)


def _text(found: Any, kind: str) -> str:
    if not isinstance(found, dict) or found.get("type") not in {"mrkdwn", "plain_text"}:
        raise InvalidBlocks(f"{kind}: no text object")
    return _short(found.get("text"), kind)


def _short(text: Any, kind: str, least: int = 1) -> str:
    if not isinstance(text, str) or not least <= len(text) <= LONGEST[kind]:
        raise InvalidBlocks(f"{kind} must be {least} to {LONGEST[kind]} characters")
    return text
