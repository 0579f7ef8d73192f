"""News of ended attempts, between the processes of one database."""

from typing import Any

import pytest

from receiver.model.tasks import Wakeups
from receiver.store.attempts import AttemptNews, AttemptNotice
from receiver.store.engine import AttemptName

pytestmark = pytest.mark.anyio


class Peers:
    """The other processes, as the store notifies them."""

    def __init__(self) -> None:
        self.told: list[list[AttemptName]] = []

    async def notify(self, ended: list[AttemptName]) -> None:
        self.told.append(ended)


async def test_subscribed_process_is_notified_of_ends_and_of_nothing_else() -> None:
    """A notice without ends is a subscription: two processes would keep each other subscribed."""
    peers: Any = Peers()
    wakeups = Wakeups()
    news = AttemptNews(peers, wakeups)
    news.receive(AttemptNotice("another", []))
    await news.publish([])
    await news.publish([("dlv_1", 1)])
    assert peers.told == [[("dlv_1", 1)]]


async def test_reader_is_woken_by_ends_only() -> None:
    peers: Any = Peers()
    wakeups = Wakeups()
    news = AttemptNews(peers, wakeups)
    await news.follow()
    with wakeups.listen("changes") as changed:
        await news.publish([])
        assert not changed.is_set()
        await news.publish([("dlv_1", 1)])
        assert changed.is_set()
    assert news.take() == [("dlv_1", 1)]
    assert peers.told == [[]]
