"""The redaction of tokens in the access logs of ASGI servers.

Most servers log the path that the scope has when the answer begins; gunicorn's own ASGI worker
logs the request line as it came, so a log filter redacts the line.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Final

from starlette.types import Scope

_BEFORE_A_TOKEN: Final = re.compile(r"/(?:webhooks/[^/]*|wake)/(?=.)", re.DOTALL)
_IN_A_LINE: Final = re.compile(r"(/(?:webhooks/[^/\s]*|wake)/)[^\s\"?]+")
_LOGGERS: Final = (
    "gunicorn.access",
    "hypercorn.access",
    "uvicorn.access",
    "granian.access",
    "mangum.http",
)


def hide_token(scope: Scope) -> None:
    """Remove the token of a callback or wake-up from the path, which servers log."""
    path = scope["path"]
    if "/webhooks/" not in path and "/wake/" not in path:
        return
    scope["path"] = _without_token(path)
    if raw := scope.get("raw_path"):
        scope["raw_path"] = _without_token(raw.decode("latin-1")).encode("latin-1")


def _without_token(path: str) -> str:
    found = _BEFORE_A_TOKEN.search(path)
    return path if found is None else f"{path[: found.end()]}..."


def guard_access_logs() -> None:
    """Redact tokens in the access logs of all known servers; a second call changes nothing."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_hide_tokens)


def _hide_tokens(record: logging.LogRecord) -> bool:
    """Redact a record in place: each server has its own format and types of arguments."""
    record.msg = _hidden(record.msg)
    if isinstance(record.args, dict):
        record.args.update({name: _hidden(value) for name, value in record.args.items()})
    elif isinstance(record.args, tuple):
        record.args = tuple(map(_hidden, record.args))
    return True


def _hidden(value: Any) -> Any:
    return _IN_A_LINE.sub(r"\1...", value) if isinstance(value, str) else value
