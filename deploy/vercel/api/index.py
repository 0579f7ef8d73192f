"""Tried here: served by Vercel's own runtime from PyPI. Not tried: a deployment, as that needs an account."""

import os

os.environ.setdefault("RECEIVER_MODE", "serverless")
# The invocation goes on after the answer, until the app has returned.
os.environ.setdefault("RECEIVER_AFTER", "after=20")

from receiver.asgi import app  # noqa: E402 - it reads the settings

__all__ = ["app"]
