"""File name extensions by media type: our own table, because those of machines differ."""

from __future__ import annotations

from typing import Final

EXTENSIONS: Final = {
    "image/apng": "apng",
    "image/avif": "avif",
    "image/bmp": "bmp",
    "image/gif": "gif",
    "image/heic": "heic",
    "image/heif": "heif",
    "image/jpeg": "jpg",
    "image/jpg": "jpg",
    "image/jxl": "jxl",
    "image/png": "png",
    "image/svg+xml": "svg",
    "image/tiff": "tiff",
    "image/vnd.adobe.photoshop": "psd",
    "image/vnd.radiance": "hdr",
    "image/webp": "webp",
    "image/x-exr": "exr",
    "image/x-icon": "ico",
    "video/3gpp": "3gp",
    "video/x-matroska": "mkv",
    "video/matroska": "mkv",
    "video/mp2t": "ts",
    "video/mp4": "mp4",
    "video/mpeg": "mpg",
    "video/ogg": "ogv",
    "video/quicktime": "mov",
    "video/webm": "webm",
    "video/x-m4v": "m4v",
    "video/x-msvideo": "avi",
    "audio/aac": "aac",
    "audio/aiff": "aiff",
    "audio/flac": "flac",
    "audio/mp4": "m4a",
    "audio/m4a": "m4a",
    "audio/x-matroska": "mka",
    "audio/matroska": "mka",
    "audio/midi": "mid",
    "audio/mpeg": "mp3",
    "audio/mp3": "mp3",
    "audio/ogg": "ogg",
    "audio/opus": "opus",
    "audio/wav": "wav",
    "audio/wave": "wav",
    "audio/webm": "weba",
    "audio/x-flac": "flac",
    "audio/x-m4a": "m4a",
    "audio/x-wav": "wav",
    "model/3mf": "3mf",
    "model/gltf+json": "gltf",
    "model/gltf-binary": "glb",
    "model/mtl": "mtl",
    "model/obj": "obj",
    "model/ply": "ply",
    "model/stl": "stl",
    "model/vnd.usdz+zip": "usdz",
    "application/gzip": "gz",
    "application/json": "json",
    "application/mp4": "mp4",
    "application/octet-stream": "bin",
    "application/ogg": "ogg",
    "application/pdf": "pdf",
    "application/x-ndjson": "ndjson",
    "application/x-safetensors": "safetensors",
    "application/x-subrip": "srt",
    "application/x-tar": "tar",
    "application/xml": "xml",
    "application/zip": "zip",
    "text/css": "css",
    "text/csv": "csv",
    "text/html": "html",
    "text/markdown": "md",
    "text/plain": "txt",
    "text/vtt": "vtt",
    "text/xml": "xml",
}
"""Extensions by media type, for the files that models make and files that accompany them.

Of several types with the same extension, the first is the usual one.
"""

_ALSO: Final = {
    "aif": "audio/aiff",
    "htm": "text/html",
    "jfif": "image/jpeg",
    "jpeg": "image/jpeg",
    "mpeg": "video/mpeg",
    "oga": "audio/ogg",
    "tif": "image/tiff",
}
_TYPES: Final = {ending: kind for kind, ending in reversed(EXTENSIONS.items())} | _ALSO


def type_of(file_name: str) -> str | None:
    """Return the media type of a file name's extension; None if it is unknown."""
    _, dot, ending = file_name.rpartition(".")
    return _TYPES.get(ending.lower()) if dot else None
