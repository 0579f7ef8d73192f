"""The search for a prediction's outputs in a provider's answer: files, their URLs, texts."""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Iterator
from typing import Any, Final

import httpx

from receiver.model.errors import Unreadable
from receiver.model.values import Output
from receiver.providers.parsing import LARGEST_NUMBER, LONGEST_ID, decode

_FILE_FIELDS: Final[dict[str, tuple[type, ...]]] = {
    "content_type": (str,),
    "file_name": (str,),
    "file_size": (int,),
    "width": (int,),
    "height": (int,),
    "duration": (int, float),
}
_DEEPEST_OUTPUT: Final = 12
_MOST_OUTPUTS: Final = 1000


def outputs(value: Any, sent: Any = None) -> list[Output]:
    """Return a model's outputs, in any shape a provider uses: text, list, object, nested files.

    In an object, a file is an object with a URL, or a URL under the name of a result; a URL under
    any other name counts only if there is nothing else. A text that was `sent` as input is no
    result, nor is a value under the name of an input. Other text counts only if it is the whole
    answer. Depth and number are bounded, as the value is untrusted.
    """
    value = _unwrapped(value)
    known = set(_texts(sent))
    return _found(value, known, any_name=False) or _found(value, known, any_name=True)


def _found(value: Any, known: set[str], *, any_name: bool) -> list[Output]:
    """Return each URL once: if possible as a file with its description, not bare."""
    found: dict[str, Output] = {}
    files = _files(value, any_name=any_name, named=True, bare=True, depth=0)
    for number, file in enumerate(itertools.islice(files, _MOST_OUTPUTS)):
        key = file.url or f"text {number}"
        if key not in known and (key not in found or found[key] == Output(url=file.url)):
            found[key] = file
    return list(found.values())


_RESULTS: Final = re.compile(
    r"urls?|data|(?:\w+_)?(?:images?|videos?|audios?|files?|outputs?|results?|mesh(?:es)?|zip|archive|"
    r"gifs?|masks?|frames?|generations?|samples?|artifacts?|glb|svg|wav|mp3|mp4)"
)
"""Names under which a bare URL is a result; `image_url` is not one, as it may be an input."""
_INPUTS: Final = re.compile(
    r"(?:.*_)?(?:prompts?|inputs?|requests?|arguments?|param\w*|loras?|logs?|errors?|detail|metrics|"
    r"timings|webhooks?|callbacks?)|(?:input|init|source|start|end|reference|control|style|"
    r"conditioning|original|user)_.*|\w*(?:status|response|cancel|callback|webhook)_url"
)
"""Names of values that repeat the request, or describe it."""
_PARTICIPANTS: Final = frozenset(
    {"model", "user", "author", "creator", "owner", "account", "options", "config", "settings"}
)
"""Names of participants; a file under one is a result only if it is described as a file (a model
may be the result), or if there is no other."""
_SMALLER: Final = frozenset({"thumbnail", "thumbnails", "thumb", "preview", "poster", "icon"})
"""Names of smaller copies of the file beside them."""


def _files(value: Any, *, any_name: bool, named: bool, bare: bool, depth: int) -> Iterator[Output]:
    if depth > _DEEPEST_OUTPUT:
        return
    if isinstance(value, str):
        url = _address(value) if named else ""
        if url:
            yield Output(url=url)
        elif bare and (text := _meaningful(value)):
            yield Output(text=text)
    elif isinstance(value, list):
        for item in value:
            yield from _files(item, any_name=any_name, named=named, bare=bare, depth=depth + 1)
    elif isinstance(value, dict):
        yield from _members(value, any_name=any_name, depth=depth)


def _meaningful(text: str) -> str:
    """Return a text without NULs, which not every store accepts; '' if it is blank."""
    return text.replace("\0", "") if text.strip("\0 \t\r\n") else ""


def _unwrapped(value: Any) -> Any:
    """Return the value of a result that is JSON with files inside a text; any other unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        inner = decode(value)
    except Unreadable:
        return value
    files = _files(inner, any_name=True, named=True, bare=False, depth=0)
    return inner if any(True for _ in files) else value


def _address(text: str) -> str:
    """Return a text that is a URL, without blanks around it; '' for any other text."""
    url = text.strip()
    if url[:5].lower() == "data:":
        head, comma, body = url.partition(",")
        if head.endswith(";base64"):
            body = "".join(body.split())
        fit = comma and body and _DATA.fullmatch(head) and body.isprintable() and " " not in body
        return f"{head},{body}" if fit else ""
    if not _WEB.match(url) or len(url) > _LONGEST_URL or not url.isprintable() or " " in url:
        return ""
    if _PLAIN.fullmatch(url):
        return url
    try:
        return url if httpx.URL(url).host else ""
    except (httpx.InvalidURL, UnicodeError, ValueError):
        return ""


_WEB: Final = re.compile(
    r"https?://(?:[^/?#@\\]*@)?(?:\[[\da-f:.]+\]|[^/?#@\\:\[\]]+)(?::\d{1,5})?(?=[/?#]|$)",
    re.IGNORECASE,
)
_PLAIN: Final = re.compile(
    r"https?://(?:[a-z\d](?:[a-z\d-]{0,61}[a-z\d])?\.)+[a-z]{2,}/[\w./~%+=&?-]*", re.ASCII
)
"""URLs that httpx would accept too, but more slowly."""
_LONGEST_URL: Final = 16 * 1024
_DATA: Final = re.compile(
    r"data:(?:[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=(?:\"[^\"]*\"|[^\s\";]*))*(?:;base64)?", re.IGNORECASE
)


def _texts(value: Any) -> Iterator[str]:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item.strip()
        elif isinstance(item, dict | list):
            left += item.values() if isinstance(item, dict) else item


def _members(value: dict[str, Any], *, any_name: bool, depth: int) -> Iterator[Output]:
    file = _file(value)
    if file is not None:
        yield file
    for name, item in value.items():
        kind = name.lower()[:LONGEST_ID]
        took_part = kind in _PARTICIPANTS and not _is_described(item)
        if _INPUTS.fullmatch(kind) or (took_part and not any_name):
            continue
        if file and (kind in _SMALLER or isinstance(item, str)):
            continue
        named = any_name or bool(_RESULTS.fullmatch(kind))
        yield from _files(item, any_name=any_name, named=named, bare=False, depth=depth + 1)


def _is_described(value: Any) -> bool:
    """Return whether an object has the type, name, size or duration of a file."""
    return isinstance(value, dict) and not _FILE_FIELDS.keys().isdisjoint(value)


def _file(value: dict[str, Any]) -> Output | None:
    """Return the file that an object describes, by its URL or in base64."""
    url, b64 = value.get("url"), value.get("b64_json")
    fields: dict[str, Any] = {"url": _address(url) if isinstance(url, str) else ""}
    if not fields["url"]:
        return data_uri(b64) if isinstance(b64, str) else None
    for name, kinds in _FILE_FIELDS.items():
        given: Any = value.get(name)
        if type(given) in kinds and (isinstance(given, str) or abs(given) < LARGEST_NUMBER):
            fields[name] = float(given) if float in kinds else given
    return Output(**fields)


_BASE64: Final = re.compile(r"[A-Za-z0-9+/]*={0,2}")
_MAGIC: Final = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"RIFF", "image/webp"),
)


def data_uri(text: str) -> Output | None:
    """Wrap base64 text as a data URI, with the type its first bytes show; None if it is none."""
    b64 = "".join(text.split())
    try:
        head = base64.b64decode(b64[:16], validate=True)
    except ValueError:
        return None
    if not head or not _BASE64.fullmatch(b64):
        return None
    kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
    if head[4:8] == b"ftyp":
        kind = "video/mp4"
    return Output(url=f"data:{kind or 'application/octet-stream'};base64,{b64}", content_type=kind)
