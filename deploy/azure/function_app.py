"""Tried here: called by azure-functions, Azure's own library. Not tried: a deployment, as that needs an account."""

from receiver.azure import app

__all__ = ["app"]
