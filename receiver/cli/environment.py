"""The settings of a command: those of the environment and, in development, of `.env`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from receiver.model.errors import ReceiverError
from receiver.observability import logging as logs
from receiver.settings import Settings, development, env_file


def read_env_file(*, dev: bool) -> None:
    """In development, add the variables of `.env` to os.environ, which handlers read too."""
    if dev:
        os.environ.update(env_file.merged(os.environ))


def environment(*, dev: bool) -> dict[str, str]:
    """Return the environment, with RECEIVER_DEV if a command has --dev."""
    return dict(os.environ) | ({"RECEIVER_DEV": "1"} if dev else {})


def settings(handlers: Sequence[str] | None = None, *, dev: bool) -> Settings:
    """Read the settings and configure the logs, for a command that runs part of a receiver."""
    read_env_file(dev=dev)
    settings = Settings.read(environment(dev=dev))
    if handlers:  # not joined by commas: a path may have one
        settings = replace(settings, handlers=tuple(handlers))
    logs.configure(settings.log_format, settings.log_level)
    return settings


def chat_settings(*, dev: bool) -> Settings:
    """Read the settings to set up chat platforms; raise ReceiverError without recipes."""
    found = development.with_secrets(settings(dev=dev))
    if not found.recipes.recipes:
        raise ReceiverError("there are no recipes: RECEIVER_RECIPES names their file")
    return found
