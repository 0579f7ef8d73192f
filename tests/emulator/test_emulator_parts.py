"""Parts of the emulator alone: timers, the callback sender, hang-ups and waiters."""

import asyncio
import random
import socket
from collections.abc import Callable

from starlette.types import Message

from receiver.emulator import Rule
from receiver.emulator.callback_sender import Callback, CallbackSender, Timers
from receiver.emulator.fal import CALLBACKS
from receiver.emulator.faults import Faults
from receiver.emulator.options import Schedule
from receiver.emulator.outgoing import AT_ONCE
from receiver.emulator.push_faults import PushFaults
from receiver.emulator.wire import CLOSE, HangUp
from tests.emulator.parts import prediction


class HandTimers(Timers):
    """Timers that a test fires by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.acts: list[Callable[[], None]] = []

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        assert seconds > 0
        self.acts.append(act)


def test_closed_timers_drop_delayed_calls() -> None:
    async def scenario() -> list[str]:
        timers, done = Timers(), list[str]()
        timers.after(0, lambda: done.append("before"))
        await asyncio.sleep(0)
        timers.closed = True
        timers.after(0, lambda: done.append("after"))
        await asyncio.sleep(0.001)
        return done

    assert "after" not in asyncio.run(scenario())


def test_reordered_callback_is_sent_only_once() -> None:
    timers, sent = HandTimers(), list[str]()
    faults = Faults(random.Random(1))
    faults.replace([Rule(fault="reorder_callbacks", times=1)])
    faulty = PushFaults(faults, timers)
    faulty.push(prediction(), lambda: sent.append("first"))
    faulty.push(prediction(), lambda: sent.append("second"))
    timers.acts.pop()()
    assert sent == ["second", "first"]


def test_callbacks_beyond_the_concurrency_limit_are_all_attempted() -> None:
    async def scenario() -> None:
        sender = CallbackSender(Timers(), 1)
        pending = [prediction(callback_url="mailto:nobody") for _ in range(AT_ONCE + 10)]
        for one in pending:
            sender.send(Callback(one, b"", dict, CALLBACKS))
        for one in pending:
            await one.until(lambda p: bool(p.callback_attempts))
        await sender.close()

    asyncio.run(scenario())


def test_callback_without_response_times_out_and_is_retried() -> None:
    async def scenario(url: str) -> list[str | None]:
        sender, one = CallbackSender(Timers(), 1), prediction(callback_url=url)
        schedule = Schedule(waits=(0, 0), first_timeout=0.05, later_timeout=0.05)
        sender.send(Callback(one, b"", dict, schedule))
        await one.until(lambda p: len(p.callback_attempts) == 3)
        await sender.close()
        return [attempt.error for attempt in one.callback_attempts]

    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/"
        assert asyncio.run(scenario(url)) == ["timeout"] * 3


def test_close_cancels_a_running_callback_attempt() -> None:
    async def scenario(url: str) -> bool:
        sender, one = CallbackSender(Timers(), 1), prediction(callback_url=url)
        sender.send(Callback(one, b"", dict, CALLBACKS))
        await asyncio.sleep(0)
        await sender.close()
        return bool(one.callback_attempts)

    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/"
        assert asyncio.run(scenario(url)) is False


def test_hang_up_waits_for_the_disconnect() -> None:
    messages = [{"type": "http.request"}, {"type": "http.disconnect"}, {"type": "http.disconnect"}]
    closed = list[str]()

    async def receive() -> Message:
        return messages.pop(0)

    async def send(_message: Message) -> None:
        raise AssertionError

    hang_up = HangUp(after=1)
    asyncio.run(hang_up({CLOSE: lambda: closed.append("closed")}, receive, send))
    assert (closed, messages) == (["closed"], [])


def test_state_change_ignores_a_cancelled_waiter() -> None:
    async def scenario() -> None:
        one = prediction()
        waiting = asyncio.ensure_future(one.until(lambda p: p.finished))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.sleep(0)
        one.move("succeeded")

    asyncio.run(scenario())
