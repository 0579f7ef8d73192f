"""Chats survive restarts in Slack, Discord and Telegram, as their state is stored."""

from __future__ import annotations

from typing import Final, get_args

import pytest

from receiver.emulator.chats.board import Platform
from receiver.testing import make_event
from tests.handlers.chat import KEPT, keeping
from tests.handlers.parts import built_in
from tests.handlers.talking import RECIPES, Kits, predictions, talking

PLATFORMS: Final = get_args(Platform)
DAYS: Final = 3 * 86_400


@pytest.mark.parametrize("platform", PLATFORMS)
def test_duplicate_after_a_restart_is_ignored_and_buttons_work_after_days(
    receiver_kit: Kits, platform: Platform
) -> None:
    kit = talking(receiver_kit, f"{platform}_in")
    said = kit.says("/imagine a lighthouse", on=platform)
    [reply] = [one for one in said.replies if one.pictures]
    kit.crash_after_ack(make_event())
    before = len(predictions(kit))
    assert kit.repeat(said, times=4).pictures == []
    assert len(predictions(kit)) == before
    kit.move(DAYS)
    again = kit.presses(reply, "Again", on=platform)
    assert len(again.pictures) == 1
    assert predictions(kit)[-1].input["prompt"] == "a lighthouse"


@pytest.mark.parametrize("place", ["C1", "C2"])
def test_flagged_picture_is_only_linked_in_slack(receiver_kit: Kits, place: str) -> None:
    kit = receiver_kit(keeping, built_in("slack_in"), chats=True, settings=RECIPES)
    kit.chats.slack.outside.add("C2")
    reply = kit.says("/imagine a lighthouse", place=place).reply
    assert (reply.files, KEPT in str(reply.raw["blocks"])) == ([], True)
    assert "flagged: all black" in reply.text
