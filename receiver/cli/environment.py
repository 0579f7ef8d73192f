"""The settings of a command: those of the environment and, in development, of `.env`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from receiver.model.errors import ReceiverError
from receiver.observability import logging as logs
from receiver.settings import Settings, development, env_file


def read_env_file(*, dev: bool) -> None:
    """In development set what `.env` of this folder sets: handlers read the environment too."""
    if dev:
        os.environ.update(env_file.merged(os.environ))


def environment(handlers: Sequence[str] | None = None, *, dev: bool) -> dict[str, str]:
    """Return the environment as the arguments change it."""
    env = dict(os.environ) | ({"RECEIVER_DEV": "1"} if dev else {})
    return env | ({"RECEIVER_HANDLERS": ",".join(handlers)} if handlers else {})


def settings(handlers: Sequence[str] | None = None, *, dev: bool) -> Settings:
    """Read the settings and set the logs up, as every command that runs something does."""
    read_env_file(dev=dev)
    settings = Settings.read(environment(dev=dev))
    if handlers:  # as they are: a path may have a comma
        settings = replace(settings, handlers=tuple(handlers))
    logs.configure(settings.log_format, settings.log_level)
    return settings


def chat_settings(*, dev: bool) -> Settings:
    """Read the settings that chat platforms are set up by; raise where there are no recipes."""
    read_env_file(dev=dev)
    settings = development.with_secrets(Settings.read(environment(dev=dev)))
    if not settings.recipes.recipes:
        raise ReceiverError("there are no recipes: RECEIVER_RECIPES names their file")
    return settings
