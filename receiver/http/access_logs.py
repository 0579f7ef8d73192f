"""Tokens in paths stay out of the access logs of the servers that may run the app.

Most servers write the path that the scope has when the answer begins; gunicorn's own ASGI worker
writes the request line as it came, so the line is changed on its way into the log.
"""

from __future__ import annotations

import logging
import re
from typing import Any, Final

from starlette.types import Scope

_IN_A_PATH: Final = re.compile(r"(/(?:webhooks/[^/]*|wake)/).+", re.DOTALL)
_IN_A_LINE: Final = re.compile(r"(/(?:webhooks/[^/\s]*|wake)/)[^\s\"?]+")
_LOGGERS: Final = (
    "gunicorn.access",
    "hypercorn.access",
    "uvicorn.access",
    "granian.access",
    "mangum.http",
)


def hide_token(scope: Scope) -> None:
    """Take a callback's token out of the path, which servers write into their access logs."""
    if "/webhooks/" not in scope["path"] and "/wake/" not in scope["path"]:
        return
    scope["path"] = _IN_A_PATH.sub(r"\1...", scope["path"])
    if raw := scope.get("raw_path"):
        scope["raw_path"] = _IN_A_PATH.sub(r"\1...", raw.decode("latin-1")).encode("latin-1")


def guard_access_logs() -> None:
    """Take tokens out of what servers log of a request; to do it twice changes nothing."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_hide_tokens)


def _hide_tokens(record: logging.LogRecord) -> bool:
    """Change a record in place: servers have formats, and kinds of arguments, of their own."""
    record.msg = _hidden(record.msg)
    if isinstance(record.args, dict):
        record.args.update({name: _hidden(value) for name, value in record.args.items()})
    elif isinstance(record.args, tuple):
        record.args = tuple(map(_hidden, record.args))
    return True


def _hidden(value: Any) -> Any:
    return _IN_A_LINE.sub(r"\1...", value) if isinstance(value, str) else value
