"""Tried here: served by Vercel's own runtime. Not tried: a deployment (needs an account)."""

import os

os.environ.setdefault("RECEIVER_MODE", "serverless")
# The invocation goes on after the answer, until the app has returned.
os.environ.setdefault("RECEIVER_AFTER", "after=20")

from receiver.asgi import app

__all__ = ["app"]
