"""Tried here: called by azure-functions, Azure's own library. Not tried: Azure itself.

In a project that `receiver init` made. `az functionapp config appsettings set` has the settings:
RECEIVER_SECRET_KEY, RECEIVER_API_KEYS, RECEIVER_DATABASE_URL (a pooler's), RECEIVER_PUBLIC_URL,
FAL_KEY, RECEIVER_AFTER=inline=2, and RECEIVER_HANDLERS=my_handlers: by name, as the current folder
may be another.
"""

from receiver.azure import app

__all__ = ["app"]
