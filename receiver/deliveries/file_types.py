"""File types: by the first bytes, by the announced content types, and by the file extension."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from typing import Final

from receiver.deliveries.handlers import Dead
from receiver.model.extensions import EXTENSIONS

_VAGUE: Final = frozenset(
    {
        *("application/gzip", "application/json", "application/octet-stream", "application/xml"),
        *("application/zip", "audio/ogg", "binary/octet-stream", "text/plain", "text/xml", ""),
    }
)
_ENDINGS: Final = frozenset(
    {
        *EXTENSIONS.values(),
        *("blend", "ckpt", "fbx", "gguf", "jpeg", "onnx", "pt", "pth", "spz", "splat", "toml"),
        *("usd", "usda", "usdc", "yaml", "yml"),
    }
)
"""File extensions that are kept if the content type is vague; none is of a program."""


def extension_of(content_type: str, file_name: str) -> str:
    """Return the usual file extension for a type, without a dot; `bin` for an unknown type.

    It does not depend on the machine's own table of types. For a vague type, such as a ZIP file's,
    it is the extension of the file's own name if that is a known one.
    """
    ending = file_name.rpartition(".")[2].lower()
    if content_type in _VAGUE and ending in _ENDINGS:
        return ending
    return EXTENSIONS.get(content_type, "bin")


def kind_of(head: bytes, promises: Sequence[str]) -> str:
    """Return the content type; raise Dead if the bytes contradict a promised family of types."""
    families = [promise for promise in promises if promise.startswith(_FAMILIES)]
    shown = sniff(head) or ("text/plain" if _is_plain(_text(head)) else None)
    for promise in families:
        if not head:
            raise Dead(f"the result is empty: {promise} was promised")
        if shown and not _matches_promise(shown, promise):
            raise Dead(
                f"the result is not what it says: {promise} was promised and the bytes are {shown}"
            )
    announced = next((p for p in [*families, *promises] if p not in _NO_PROMISE), _UNKNOWN)
    return _called(sniff(head), announced)


def _matches_promise(shown: str, promise: str) -> bool:
    family = promise.partition("/")[0]
    if promise in _TEXT_FORMATS and shown in {"text/plain", "application/xml"}:
        return True
    if shown in _CONTAINERS:
        return family != "image"
    return shown.startswith(f"{family}/") or (family == "video" and shown in _MOVING)


def _called(shown: str | None, announced: str) -> str:
    """Return the type that the bytes show, or the announced type if that is more specific."""
    if shown is None or announced.endswith(f"+{shown.partition('/')[2]}"):
        return announced
    other = _EITHER.get(shown, "")
    return other if other and announced.startswith(f"{other.partition('/')[0]}/") else shown


_UNKNOWN: Final = "application/octet-stream"
_NO_PROMISE: Final = frozenset({"", _UNKNOWN, "binary/octet-stream"})
_FAMILIES: Final = ("image/", "video/", "audio/")
_EITHER: Final = {
    "video/mp4": "audio/mp4",
    "video/webm": "audio/webm",
    "video/x-matroska": "audio/x-matroska",
    "video/3gpp": "audio/3gpp",
    "audio/ogg": "video/ogg",
}
"""Containers whose first bytes do not show whether they hold only audio: video and audio type."""
_CONTAINERS: Final = frozenset({*_EITHER, *_EITHER.values(), "video/quicktime"})
_MOVING: Final = frozenset({"image/gif", "image/apng", "image/webp"})
"""Images that may be animated, and so are accepted as a video."""
_TEXT_FORMATS: Final = frozenset(
    {
        "image/svg+xml",
        "image/x-xpixmap",
        "image/x-xbitmap",
        "image/x-portable-bitmap",
        "image/x-portable-graymap",
        "image/x-portable-pixmap",
        "audio/mpegurl",
        "audio/x-mpegurl",
        "audio/x-scpls",
    }
)
"""Image and playlist formats that are text."""


def _bytes_where(fits: Callable[[int], bool]) -> bytes:
    """Return a character class of a regular expression that matches the bytes that fit."""
    return b"[" + b"".join(b"\\x%02x" % byte for byte in range(256) if fits(byte)) + b"]"


# Audio frames begin with eleven or twelve set bits, as other data may: the next bits must be an
# existing bit rate and sampling rate (ISO 11172-3 and 13818-7).
_MPEG_RATES: Final = _bytes_where(lambda byte: 0 < byte >> 4 < 15 and byte >> 2 & 3 != 3)  # noqa: PLR2004 - bits
_AAC_RATES: Final = _bytes_where(lambda byte: byte >> 2 & 15 < 13)  # noqa: PLR2004 - bits

HEAD: Final = 512
"""Bytes at the start of a file that are examined."""
_SIGNATURES: Final = (
    (rb"\x89PNG\r\n\x1a\n.{25}.{0,400}acTL", "image/apng"),
    (rb"\x89PNG\r\n\x1a\n", "image/png"),
    (rb"\xff\xd8\xff", "image/jpeg"),
    (rb"GIF8[79]a", "image/gif"),
    (rb"RIFF.{4}WEBP", "image/webp"),
    (rb"RIFF.{4}WAVE", "audio/wav"),
    (rb"RIFF.{4}AVI ", "video/x-msvideo"),
    (rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "image/bmp"),
    (rb"II[*+]\0|MM\0[*+]", "image/tiff"),
    (rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a", "image/jxl"),
    (rb"\0.{3}ftyp(?:avi[fs]|(?:mif1|msf1|miaf).{4}(?:.{4}){0,15}avi[fs])", "image/avif"),
    (rb"\0.{3}ftyphe(?:i[cxms]|v[cxms])", "image/heic"),
    (rb"\0.{3}ftyp(?:mif1|msf1|miaf)", "image/heif"),
    (rb"\0.{3}ftypM4[AB] ", "audio/mp4"),
    (rb"\0.{3}ftypqt  |\0.{3}(?:moov|mdat|wide)", "video/quicktime"),
    (rb"\0.{3}ftyp3g", "video/3gpp"),
    (rb"\0.{3}[fs]typ", "video/mp4"),
    (rb"\x1aE\xdf\xa3.{0,60}matroska", "video/x-matroska"),
    (rb"\x1aE\xdf\xa3", "video/webm"),
    (rb"OggS.{24}.{0,256}\x80theora", "video/ogg"),
    (rb"OggS", "audio/ogg"),
    (rb"fLaC", "audio/flac"),
    (rb"FORM.{4}AIF[FC]", "audio/aiff"),
    (rb"ID3[\x02-\x04]|\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd]" + _MPEG_RATES, "audio/mpeg"),
    (rb"\xff[\xf0\xf1\xf8\xf9]" + _AAC_RATES, "audio/aac"),
    (rb"glTF[\1\2]\0\0\0", "model/gltf-binary"),
    (rb"ply\r?\nformat ", "model/ply"),
    (rb".{7}\0\{\s*\"", "application/x-safetensors"),
    (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "application/zip"),
    (rb"\x1f\x8b\x08", "application/gzip"),
    (rb"%PDF-", "application/pdf"),
)
# Atomic groups: backtracking over many comments would take too long.
_COMMENTS: Final = r"(?>(?:<!--.*?-->\s*)*)"
_BEFORE: Final = r"(?>(?:<\?xml.*?\?>\s*)?)" + _COMMENTS
_MARKUP: Final = (
    (_BEFORE + r"(?:<!doctype svg[^>]*>\s*)?" + _COMMENTS + r"<svg[\s/>]", "image/svg+xml"),
    (_BEFORE + r"<!doctype html\b", "text/html"),
    (
        _BEFORE + r"<(?:html|head|body|title|meta|link|script|style|iframe|table|center|font|"
        r"div|span|h[1-6]|p|pre|br|b|a|img)[\s/>]",
        "text/html",
    ),
    (r"<\?xml\s|<!--|<!doctype\s|<[a-z_][\w:.-]*[\s/>]", "application/xml"),
    (r"\{\s*(?:\"|\}|$)|\[\s*(?:[\"{\[\]\d-]|true|false|null|$)", "application/json"),
)
_BOMS: Final = (
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_NOT_WRITTEN: Final = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def sniff(head: bytes) -> str | None:
    """Return the type that the first 512 bytes of a file show; None if they show none."""
    for signature, kind in _SIGNATURES:
        if re.match(signature, head, re.DOTALL):
            return kind
    text = _text(head)
    how = re.DOTALL | re.IGNORECASE
    return next((kind for markup, kind in _MARKUP if re.match(markup, text, how)), None)


def _text(head: bytes) -> str:
    """Return the head as text, without a BOM and leading blanks; '' if it is not text.

    Undecodable bytes are replaced: a page in an old encoding is still a page.
    """
    encoding = next((name for bom, name in _BOMS if head.startswith(bom)), "utf-8")
    # The incremental decoder leaves out a character that is cut off at the end.
    text = codecs.getincrementaldecoder(encoding)("replace").decode(head)
    return "" if _NOT_WRITTEN.search(text) else text.lstrip("\ufeff \t\r\n\f\v")


def _is_plain(text: str) -> bool:
    return bool(text) and "\N{REPLACEMENT CHARACTER}" not in text
