"""Set up chat platforms: their commands, one for each recipe, and the URL that they call."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, Final

import httpx

from receiver.cli.environment import chat_settings
from receiver.model.errors import ReceiverError
from receiver.model.recipes import Option, Recipe, RecipeBook
from receiver.model.sealing import Seals
from receiver.settings import Settings
from receiver.settings.tls import trusted

SCOPES: Final = (
    "app_mentions:read",
    "chat:write",
    "commands",
    "files:read",
    "files:write",
    "im:history",
    "im:write",
)
"""The bot's OAuth scopes in Slack."""
URLS: Final = {
    "SLACK_URL": "https://slack.com/api",
    "DISCORD_URL": "https://discord.com/api/v10",
    "TELEGRAM_URL": "https://api.telegram.org",
}
UPDATES: Final = ("message", "callback_query")
AGENT: Final = {"user-agent": "DiscordBot (prediction-receiver, 1)"}
_TYPES: Final = {"text": 3, "integer": 4, "boolean": 5, "number": 10, "picture": 11}
_MAX_OPTIONS: Final = 25
"""Discord's limit of options for a command, and of choices for an option."""
_MAX_DESCRIPTION: Final = 100
"""Limit of characters of a description, and of a choice in Discord."""
_MAX_TEXT: Final = 6000
"""Discord's limit of characters of a text option."""
_PATIENCE: Final = 30.0


def of(env: Mapping[str, str], name: str) -> str:
    """Return a setting of a chat's handlers; raise ReceiverError if it has no value or default."""
    found = env.get(name, "").strip() or URLS.get(name, "")
    if not found:
        raise ReceiverError(f"{name} is not set")
    return found.rstrip("/")


def discord_application(env: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """Return the URL of our application in Discord's API, and the headers of its bot."""
    url = f"{of(env, 'DISCORD_URL')}/applications/{of(env, 'DISCORD_APPLICATION')}"
    return url, AGENT | {"authorization": f"Bot {of(env, 'DISCORD_TOKEN')}"}


def telegram_bot(env: Mapping[str, str]) -> str:
    """Return the URL of our bot in Telegram's API."""
    return f"{of(env, 'TELEGRAM_URL')}/bot{of(env, 'TELEGRAM_TOKEN')}"


def address(settings: Settings, platform: str) -> str:
    """Return the URL at which a platform calls us; raise ReceiverError without a public URL."""
    if not settings.public_url:
        raise ReceiverError("RECEIVER_PUBLIC_URL is not set: chat platforms call us there")
    return f"{settings.public_url}/in/{platform}"


def secret(settings: Settings) -> str:
    """Return the secret that Telegram must send with each update."""
    return Seals([key.reveal() for key in settings.secret_keys]).secrets("telegram-webhook")[0]


# --- commands for recipes ---


def slack_manifest(book: RecipeBook, url: str, name: str) -> dict[str, Any]:
    """Return the manifest of an app in Slack: a command for each recipe."""
    commands = [
        {
            "command": f"/{recipe.name}",
            "url": url,
            "description": _about(recipe),
            "usage_hint": recipe.rest or "help",
            "should_escape": False,
        }
        for recipe in book.recipes.values()
    ]
    return {
        "display_information": {"name": name},
        "features": {
            "app_home": {"messages_tab_enabled": True, "messages_tab_read_only_enabled": False},
            "bot_user": {"display_name": name, "always_online": True},
            "slash_commands": commands,
        },
        "oauth_config": {"scopes": {"bot": list(SCOPES)}},
        "settings": {
            "event_subscriptions": {
                "request_url": url,
                "bot_events": ["app_mention", "message.im"],
            },
            "interactivity": {"is_enabled": True, "request_url": url},
            "socket_mode_enabled": False,
        },
    }


def discord_commands(book: RecipeBook) -> list[dict[str, Any]]:
    """Return a command for each recipe, in Discord's format."""
    return [
        {
            "name": recipe.name,
            "type": 1,
            "description": _about(recipe),
            "options": _options(recipe),
        }
        for recipe in book.recipes.values()
    ]


def _options(recipe: Recipe) -> list[dict[str, Any]]:
    found = [_option(name, option) for name, option in recipe.options.items()]
    return sorted(found, key=lambda option: not option.get("required"))[:_MAX_OPTIONS]


def _option(name: str, option: Option) -> dict[str, Any]:
    about = (option.about or name)[:_MAX_DESCRIPTION]
    found: dict[str, Any] = {"name": name, "type": _TYPES[option.kind], "description": about}
    if option.required:
        found["required"] = True
    # If Discord does not offer the choices, people type one, and the recipe checks it.
    is_short = all(len(str(each)) <= _MAX_DESCRIPTION for each in option.choices)
    few = len(option.choices) <= _MAX_OPTIONS
    if option.choices and option.kind != "boolean" and few and is_short:
        found["choices"] = [{"name": str(each), "value": each} for each in option.choices]
    longest = option.longest and min(option.longest, _MAX_TEXT)
    bounds = {"min_value": option.least, "max_value": option.most, "max_length": longest}
    return found | {word: bound for word, bound in bounds.items() if bound is not None}


def telegram_commands(book: RecipeBook) -> list[dict[str, str]]:
    """Return the menu of commands; a recipe whose name Telegram does not accept is left out."""
    found = [
        {"command": recipe.name, "description": _about(recipe)}
        for recipe in book.recipes.values()
        if re.fullmatch(r"[a-z0-9_]{1,32}", recipe.name)
    ]
    return [*found, {"command": "help", "description": "what there is to order"}]


def _about(recipe: Recipe) -> str:
    return (recipe.about or recipe.name)[:_MAX_DESCRIPTION]


# --- set-up ---


def show_manifest(name: str, *, dev: bool) -> str:
    """Return the manifest for Slack as JSON."""
    settings = chat_settings(dev=dev)
    manifest = slack_manifest(settings.recipes, address(settings, "slack"), name)
    return json.dumps(manifest, indent=2)


def register_in_discord(guild: str, *, dev: bool) -> str:
    """Replace the commands of one server (`guild`) or of all; return a summary."""
    settings = chat_settings(dev=dev)
    url, (application, bot) = address(settings, "discord"), discord_application(os.environ)
    where = f"/guilds/{guild}" if guild else ""
    _send("PUT", f"{application}{where}/commands", discord_commands(settings.recipes), bot)
    names = ", ".join(f"/{name}" for name in settings.recipes.recipes) or "none"
    return f"commands: {names}\nInteractions Endpoint URL: {url}"


def set_telegram_up(*, poll: bool, dev: bool) -> str:
    """Set the menu of commands, and set or (`poll`) remove the webhook; return a summary."""
    settings, bot = chat_settings(dev=dev), telegram_bot(os.environ)
    token = of(os.environ, "TELEGRAM_TOKEN")
    url = "" if poll else address(settings, "telegram")
    commands = telegram_commands(settings.recipes)
    _send("POST", f"{bot}/setMyCommands", {"commands": commands}, token=token)
    names = ", ".join(f"/{each['command']}" for each in commands)
    if poll:
        _send("POST", f"{bot}/deleteWebhook", {}, token=token)
        return f"commands: {names}\nno webhook: serve with TELEGRAM_POLL=1"
    hook = {"url": url, "secret_token": secret(settings), "allowed_updates": list(UPDATES)}
    _send("POST", f"{bot}/setWebhook", hook, token=token)
    return f"commands: {names}\nwebhook: {url}"


def _send(
    method: str, url: str, body: Any, headers: dict[str, str] | None = None, *, token: str = ""
) -> None:
    """Send a request; raise ReceiverError, whose text never contains the `token` of the URL."""
    try:
        answer = httpx.request(
            method, url, json=body, headers=headers, timeout=_PATIENCE, verify=trusted()
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        host = url.partition("://")[2].partition("/")[0]  # what follows may hold a token
        why = str(error) or type(error).__name__
        raise ReceiverError(f"{host} does not answer ({why}): run the command again") from None
    if not answer.is_success:
        text = answer.text.replace(token, "…") if token else answer.text  # a proxy quotes the path
        raise ReceiverError(f"HTTP {answer.status_code}: {text[:300]}")
