"""A local file as an input: a data URI, which providers accept in place of a URL."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Final

from receiver.client.steps import ClientError
from receiver.model.extensions import type_of

LARGEST: Final = 3_000_000
"""Bytes; in base64, with the rest of a submit, they fit RECEIVER_MAX_BODY_BYTES (4 MiB)."""


def file(path: str | os.PathLike[str], content_type: str | None = None) -> str:
    """Return a file as a data URI, for an input like `image_url`.

    Its media type follows from its name's ending, unless `content_type` is given. Raises
    ClientError if the file cannot be read, is larger than 3 MB, or its type is not known.
    """
    kind = content_type or type_of(Path(path).name)
    if kind is None:
        raise ClientError("unfit", f"{path}: its name shows no type: pass content_type=")
    try:
        with Path(path).open("rb") as opened:
            content = opened.read(LARGEST + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ClientError("unfit", f"{path} cannot be read: {why}") from error
    if len(content) > LARGEST:
        raise ClientError(
            "unfit",
            f"{path} is larger than {LARGEST:,} bytes: put it where the provider can fetch it, and "
            "give its URL",
        )
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
