"""Check the chat platforms for orders: the token, the commands, the webhook."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import httpx
import msgspec

from receiver.cli import chats
from receiver.cli.doctor.findings import Findings, fail, ok, warn
from receiver.cli.doctor.network import REQUEST_ERRORS, Prober
from receiver.deliveries.handler_settings import is_on
from receiver.model.errors import ReceiverError
from receiver.settings import Settings

_AGAIN: Final = "run `receiver chat {}` again"


async def check_slack(env: Mapping[str, str], _settings: Settings, prober: Prober) -> Findings:
    """Check the token and its scopes."""
    token = {"authorization": f"Bearer {chats.of(env, 'SLACK_TOKEN')}"}
    url = f"{chats.of(env, 'SLACK_URL')}/auth.test"
    answer = await prober.send(httpx.Request("POST", url, headers=token), "Slack")
    body = msgspec.json.decode(answer.body, type=dict[str, Any])
    if not body.get("ok"):
        return [fail(f"SLACK_TOKEN: {body.get('error')}", "install the app again")]
    scopes = answer.headers.get("x-oauth-scopes", "")
    given = {scope.strip() for scope in scopes.split(",")}
    missing = [scope for scope in chats.SCOPES if scopes and scope not in given]
    if missing:
        fix = "take the manifest of `receiver chat slack`, and install the app again"
        return [fail(f"the bot lacks {', '.join(missing)}", fix)]
    return [ok(f"{body.get('user')} in {body.get('team')}")]


async def check_discord(env: Mapping[str, str], settings: Settings, prober: Prober) -> Findings:
    """Check that the commands are those of the recipes."""
    application, bot = chats.discord_application(env)
    request = httpx.Request("GET", f"{application}/commands", headers=bot)
    answer = await prober.send(request, "Discord")
    if answer.status != httpx.codes.OK:
        text = f"HTTP {answer.status} for the commands of DISCORD_APPLICATION"
        return [fail(text, "correct DISCORD_TOKEN and DISCORD_APPLICATION")]
    found = msgspec.json.decode(answer.body, type=list[dict[str, Any]])
    there = {command.get("name"): _names(command) for command in found}
    wanted = {one["name"]: _names(one) for one in chats.discord_commands(settings.recipes)}
    if not there:
        text = "no commands for all servers: if you registered those of one server, that is right"
        return [ok(f"{text}; else run `receiver chat discord`")]
    if there != wanted:
        text = f"the commands for all servers are {_list(there)}, the recipes {_list(wanted)}"
        return [warn(text, _AGAIN.format("discord"))]
    return [ok(f"commands {_list(there)}")]


def _names(command: Mapping[str, Any]) -> list[str]:
    return [str(option.get("name")) for option in command.get("options") or []]


def _list(names: Mapping[Any, object]) -> str:
    return ", ".join(f"/{name}" for name in sorted(names)) or "none"


async def check_telegram(env: Mapping[str, str], settings: Settings, prober: Prober) -> Findings:
    """Check the webhook and its last error, the menu, and the group privacy."""
    bot = chats.telegram_bot(env)

    async def get(method: str) -> Any:
        answer = await prober.send(httpx.Request("GET", f"{bot}/{method}"), "Telegram")
        return msgspec.json.decode(answer.body, type=dict[str, Any]).get("result")

    me = await get("getMe")
    if not isinstance(me, dict):
        return [fail("TELEGRAM_TOKEN is not the token of a bot", "get it from BotFather")]
    findings: Findings = []
    hook, polls = await get("getWebhookInfo"), is_on(env.get("TELEGRAM_POLL", "0"))
    again = _AGAIN.format("telegram" + " --poll" * polls)
    if not polls and not settings.public_url:
        fix = "set it, or TELEGRAM_POLL=1 if nothing can call this machine"
        return [fail("RECEIVER_PUBLIC_URL is not set, and Telegram calls us there", fix)]
    url = "" if polls else chats.address(settings, "telegram")
    if hook["url"] != url:
        # Only the host: another program may have put the bot's token into the path.
        found = f"at {urlsplit(hook['url']).hostname}" if hook["url"] else "not set"
        text = f"the webhook is {found}, but should be {url or 'not set'}"
        findings.append(fail(text, again))
    if error := hook.get("last_error_message"):
        text = f"{hook['pending_update_count']} updates wait; last error: {error}"
        findings.append(warn(text, "read the log of the receiver"))
    if await get("getMyCommands") != chats.telegram_commands(settings.recipes):
        findings.append(warn("the menu does not match the recipes", again))
    if not me.get("can_read_all_group_messages"):
        text = f"@{me.get('username')} gets commands and replies in groups, but no mentions"
        fix = "if it should get them, /setprivacy at BotFather, and add it to its groups again"
        findings.append(ok(f"{text}: {fix}"))
    return findings or [ok(f"@{me.get('username')}")]


Check: TypeAlias = Callable[[Mapping[str, str], Settings, Prober], Awaitable[Findings]]
CHECKS: Final[Mapping[str, Check]] = {
    "slack": check_slack,
    "discord": check_discord,
    "telegram": check_telegram,
}


async def check_chat(
    platform: str, env: Mapping[str, str], settings: Settings, prober: Prober
) -> Findings:
    """Check a chat platform; return no findings if its handler is not in RECEIVER_HANDLERS."""
    names = {f"{platform}-in", f"receiver_handlers.{platform}_in"}
    if not names & set(settings.handlers):
        return []
    try:
        return await CHECKS[platform](env, settings, prober)
    except (*REQUEST_ERRORS, msgspec.MsgspecError, KeyError, TypeError) as error:
        fix = f"check {platform.upper()}_URL, and that this machine may connect to it"
        return [warn(f"it gives no valid answer: {type(error).__name__}", fix)]
    except ReceiverError as error:
        return [fail(str(error), f"set it: the handler {platform}-in needs it")]
