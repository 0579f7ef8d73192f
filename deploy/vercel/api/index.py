"""Tried here: served by Vercel's own runtime. Not tried: a deployment (needs an account).

In a project that `receiver init` made, beside `vercel.json`. `vercel env add` each of
RECEIVER_SECRET_KEY, RECEIVER_API_KEYS, RECEIVER_HANDLERS, RECEIVER_DATABASE_URL (a pooler's),
RECEIVER_PUBLIC_URL, FAL_KEY, and CRON_SECRET (`openssl rand -hex 16`), which Vercel's cron shows.
"""

import os

os.environ.setdefault("RECEIVER_MODE", "serverless")
# The invocation goes on after the answer, until the app has returned.
os.environ.setdefault("RECEIVER_AFTER", "after=20")

from receiver.asgi import app

__all__ = ["app"]
