"""Tried here: called by azure-functions, Azure's own library. Not tried: Azure itself."""

from receiver.azure import app

__all__ = ["app"]
