"""The OpenAPI document and the page at `/docs`, which the package ships as files.

They are generated here from what the routes declare, so that a receiver only serves the files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from tests.openapi.described import ALSO_FITS, CALLBACK, EXAMPLES, GROUPS, SENT, WAY_IN
from tests.openapi.document import Json, document, rows_of
from tests.openapi.page import page

FOLDER: Final = Path(__file__).parent.parent.parent / "receiver" / "http"


def made() -> Json:
    """Return the OpenAPI document."""
    groups = {heading: rows_of(classes, EXAMPLES, ALSO_FITS) for heading, classes in GROUPS.items()}
    groups["Callbacks"].insert(0, CALLBACK)
    groups["Plugins"].insert(0, WAY_IN)
    text = msgspec.json.encode(document(groups, SENT))
    return msgspec.json.decode(text)  # type: ignore[no-any-return]


FILES: Final[dict[str, Callable[[], bytes]]] = {
    "openapi.json": lambda: msgspec.json.format(msgspec.json.encode(made()), indent=1) + b"\n",
    "docs.html": lambda: page(made()).encode(),
}
"""The functions that generate the files, by file name."""
