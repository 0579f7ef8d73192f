"""Function platforms, recognized by the variables they set; a disk is lost with its process."""

from __future__ import annotations

from typing import Final

from receiver.settings.reader import Reader

NAMES: Final = (
    "AWS_LAMBDA_FUNCTION_NAME",
    "K_SERVICE",
    "VERCEL",
    "FUNCTIONS_WORKER_RUNTIME",
    "MODAL_TASK_ID",
)
"""Of AWS Lambda, Cloud Run (and Knative), Vercel, Azure Functions and Modal."""


def read_platform(reader: Reader) -> str | None:
    """Return the variable of the platform that we run on, if we run on one."""
    return next((name for name in NAMES if reader.is_set(name)), None)
