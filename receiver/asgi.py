"""The app as any ASGI server finds it: `receiver.asgi:app`, made of the environment."""

from __future__ import annotations

from receiver.coldstart import create_app

__all__ = ["app"]

app = create_app()
