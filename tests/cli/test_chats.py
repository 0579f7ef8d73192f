"""`receiver chat` sets up chat platforms from the recipes, and `receiver doctor` checks them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from receiver.cli.doctor import examine
from receiver.cli.emulating import served
from receiver.emulator import chat_settings_for, create_emulator
from receiver.emulator.chats.platforms import Chats
from receiver.http.listening import listening
from receiver.testing.chat import telegram_secret
from tests.cli.running import SECRET, receiver
from tests.emulator.serving import FAST
from tests.handlers.parts import serving
from tests.handlers.talking import RECIPES

PUBLIC: Final = "https://hooks.example"
BASE: Final = {
    "RECEIVER_SECRET_KEY": SECRET,
    "RECEIVER_PUBLIC_URL": PUBLIC,
    "RECEIVER_HANDLERS": "slack-in,discord-in,telegram-in",
    **RECIPES,
}


@dataclass
class Platforms:
    env: dict[str, str]
    chats: Chats


@pytest.fixture(scope="module")
def platforms() -> Iterator[Platforms]:
    with listening("127.0.0.1", 0) as sockets:
        emulator = create_emulator(FAST)
        with served(emulator, sockets) as url:
            yield Platforms({**BASE, **chat_settings_for(url)}, emulator.state.chats)


async def doctor(env: dict[str, str], name: str) -> list[tuple[str, str]]:
    found = await examine(env)
    return [(one.level, one.says) for one in found if one.name == name]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("platform", "name"),
    [("slack", "SLACK_TOKEN"), ("discord", "DISCORD_APPLICATION"), ("telegram", "TELEGRAM_TOKEN")],
)
async def test_missing_chat_setting_is_reported(
    platforms: Platforms, platform: str, name: str
) -> None:
    env = platforms.env | {name: ""}
    assert await doctor(env, platform) == [("FAIL", f"{name} is not set")]


def test_slack_manifest_has_a_command_for_each_recipe(tmp_path: Path) -> None:
    printed = receiver("chat", "slack", "--name", "Ann", cwd=tmp_path, **BASE)
    manifest: dict[str, Any] = json.loads(printed.stdout)
    commands = manifest["features"]["slash_commands"]
    assert [one["command"] for one in commands] == ["/imagine", "/upscale"]
    assert {one["url"] for one in commands} == {f"{PUBLIC}/in/slack"}
    assert manifest["settings"]["interactivity"]["request_url"] == f"{PUBLIC}/in/slack"
    assert "files:read" in manifest["oauth_config"]["scopes"]["bot"]
    none = receiver("chat", "slack", cwd=tmp_path, **{**BASE, "RECEIVER_RECIPES": ""})
    assert (none.returncode, "no recipes" in none.stderr) == (1, True)


@pytest.mark.anyio
async def test_discord_commands_are_registered_from_the_recipes(
    tmp_path: Path, platforms: Platforms
) -> None:
    env = platforms.env
    [(level, says)] = await doctor(env, "discord")
    assert (level, "no commands for all servers" in says) == ("ok", True)
    for guild in ("", "290926798626357999"):
        done = receiver("chat", "discord", *["--guild", guild] * bool(guild), cwd=tmp_path, **env)
        assert done.returncode == 0, done.stderr
        [imagine, _] = platforms.chats.discord.commands[guild]
        options = {one["name"]: one for one in imagine["options"]}
        assert [*options] == ["prompt", "ratio", "image"]
        assert (options["prompt"]["required"], options["image"]["type"]) == (True, 11)
        assert [one["value"] for one in options["ratio"]["choices"]] == ["1:1", "16:9"]
    assert (await doctor(env, "discord"))[0][0] == "ok"
    wrong = receiver("chat", "discord", cwd=tmp_path, **{**env, "DISCORD_TOKEN": "x.y.z"})
    assert (wrong.returncode, "401" in wrong.stderr, "x.y.z" in wrong.stderr) == (1, True, False)
    away = receiver("chat", "discord", cwd=tmp_path, **{**env, "DISCORD_URL": "http://127.0.0.1:1"})
    assert "127.0.0.1:1 does not answer" in away.stderr


def test_recipe_limits_above_those_of_discord_are_capped_or_left_out(
    tmp_path: Path, platforms: Platforms
) -> None:
    large = (
        Path(RECIPES["RECEIVER_RECIPES"]).read_text().replace("longest = 2000", "longest = 9000")
    )
    (tmp_path / "large.toml").write_text(large.replace('"16:9"]', f'"{"9" * 101}"]'))
    env = platforms.env | {"RECEIVER_RECIPES": "large.toml"}
    assert receiver("chat", "discord", "--guild", "7", cwd=tmp_path, **env).returncode == 0
    prompt, ratio, _ = platforms.chats.discord.commands["7"][0]["options"]
    assert (prompt["max_length"], "choices" in ratio) == (6000, False)


@pytest.mark.anyio
async def test_telegram_webhook_menu_and_polling_are_set_up(
    tmp_path: Path, platforms: Platforms
) -> None:
    env, telegram = platforms.env, platforms.chats.telegram
    assert ("FAIL", f"the webhook is not set, but should be {PUBLIC}/in/telegram") in await doctor(
        env, "telegram"
    )
    assert receiver("chat", "telegram", cwd=tmp_path, **env).returncode == 0
    assert telegram.webhook.url == f"{PUBLIC}/in/telegram"
    assert telegram.webhook.secret == telegram_secret(SECRET)
    assert telegram.webhook.allowed == ("message", "callback_query")
    assert [one["command"] for one in telegram.commands] == ["imagine", "upscale", "help"]
    found = await doctor(env, "telegram")
    assert [level for level, _ in found] == ["ok"]
    assert "no mentions" in found[0][1]
    telegram.webhook.error = "Wrong response from the webhook: 503"
    assert "503" in (await doctor(env, "telegram"))[0][1]
    assert receiver("chat", "telegram", "--poll", cwd=tmp_path, **env).returncode == 0
    assert telegram.webhook.url == ""
    polled = await doctor({**env, "TELEGRAM_POLL": "On", "RECEIVER_PUBLIC_URL": ""}, "telegram")
    assert [level for level, _ in polled] == ["ok"]
    telegram.webhook.url = "https://old.example/123:another-bots-token"
    for more in ({}, {"TELEGRAM_POLL": "1"}):
        [(level, says), _] = await doctor({**env, **more}, "telegram")
        assert (level, "at old.example, but" in says, "token" in says) == ("FAIL", True, False)


@pytest.mark.parametrize("platform", ["discord", "telegram"])
def test_nothing_is_set_up_without_a_public_url(
    tmp_path: Path, platforms: Platforms, platform: str
) -> None:
    chats = platforms.chats
    chats.discord.commands, chats.telegram.commands = {}, []
    done = receiver("chat", platform, cwd=tmp_path, **platforms.env | {"RECEIVER_PUBLIC_URL": ""})
    assert (done.returncode, "RECEIVER_PUBLIC_URL is not set" in done.stderr) == (1, True)
    assert (chats.discord.commands, chats.telegram.commands) == ({}, [])


def test_bot_token_is_hidden_in_error_messages(tmp_path: Path, platforms: Platforms) -> None:
    token = platforms.env["TELEGRAM_TOKEN"]
    with serving((404, {}, f"Cannot POST /bot{token}/setMyCommands".encode())) as proxy:
        env = platforms.env | {"TELEGRAM_URL": proxy.url}
        done = receiver("chat", "telegram", cwd=tmp_path, **env)
    assert "HTTP 404: Cannot POST /bot…/setMyCommands" in done.stderr
    assert token not in done.stderr


@pytest.mark.anyio
async def test_doctor_reports_missing_slack_scopes_and_an_invalid_token(
    platforms: Platforms,
) -> None:
    env = platforms.env
    assert await doctor(env, "slack") == [("ok", "imagine in Emulated")]
    platforms.chats.slack.scopes = "chat:write,commands"
    [(level, says)] = await doctor(env, "slack")
    assert (level, "files:read" in says) == ("FAIL", True)
    [(level, says)] = await doctor({**env, "SLACK_TOKEN": "xoxb-other"}, "slack")
    assert (level, says) == ("FAIL", "SLACK_TOKEN: invalid_auth")
    [(level, _)] = await doctor({**env, "SLACK_URL": "http://127.0.0.1:1"}, "slack")
    assert level == "warn"
    assert await doctor({**env, "RECEIVER_HANDLERS": "log"}, "slack") == []
