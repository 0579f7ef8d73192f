"""Parts of the emulator alone: timers, the callback sender, hang-ups and waiters."""

import asyncio
import random
import socket
from collections.abc import Callable

from starlette.types import Message

from receiver.emulator import Rule
from receiver.emulator.callback_sender import Callback, CallbackSender, Timers
from receiver.emulator.endings import Ending
from receiver.emulator.fal import Fal
from receiver.emulator.faults import Faults
from receiver.emulator.lifecycle import Lifecycle
from receiver.emulator.options import Schedule
from receiver.emulator.outgoing import AT_ONCE
from receiver.emulator.prompts import Plan
from receiver.emulator.push_faults import PushFaults
from receiver.emulator.wire import CLOSE, HangUp
from tests.emulator.parts import prediction
from tests.patience import PATIENCE


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
        timers.after(0, lambda: done.append("open"))
        await later()
        timers.after(0, lambda: done.append("closing"))
        timers.closed = True
        timers.after(0, lambda: done.append("closed"))
        await later()
        return done

    async def later() -> None:
        """Wait until all calls that are due now have run."""
        due = asyncio.Event()
        asyncio.get_running_loop().call_later(0, due.set)
        await due.wait()

    assert asyncio.run(scenario()) == ["open"]


def test_prediction_cancelled_while_running_stays_cancelled() -> None:
    timers, sent = HandTimers(), list[str]()
    lifecycle = Lifecycle(timers)
    lifecycle.on_finish["fal"] = lambda ended: sent.append(ended.id)
    one, other = (prediction(id=name, plan=Plan(1, 1, Ending())) for name in ("one", "other"))
    for each in (one, other):
        lifecycle.start(each)
        timers.acts.pop()()
    assert (one.state, other.state) == ("running", "running")
    assert lifecycle.cancel(one)
    for act in timers.acts:
        act()
    assert (one.state, other.state, sent) == ("cancelled", "succeeded", ["other"])


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
            sender.send(Callback(one, b"", dict, Fal.schedule))
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
        sender.send(Callback(one, b"", dict, Fal.schedule))
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


def test_state_change_wakes_the_waiters_after_a_cancelled_one() -> None:
    async def scenario() -> list[bool]:
        one = prediction()
        waiting = [asyncio.ensure_future(one.until(lambda p: p.finished)) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.sleep(0)
        one.move("succeeded")
        await asyncio.wait_for(waiting[1], PATIENCE)
        return [each.cancelled() for each in waiting]

    assert asyncio.run(scenario()) == [True, False]
