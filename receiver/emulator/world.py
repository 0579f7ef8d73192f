"""The state that the emulated providers share."""

import random
import time
import uuid
from collections.abc import Callable

from starlette.responses import Response

from receiver.emulator.callback_sender import CallbackSender, Timers
from receiver.emulator.faults import Faults
from receiver.emulator.ledger import Ledger
from receiver.emulator.lifecycle import Lifecycle
from receiver.emulator.options import Options, Provider
from receiver.emulator.push_faults import PushFaults
from receiver.emulator.wire import Refusal


class World:
    """One emulator's state."""

    def __init__(self, options: Options, now: Callable[[], float] = time.time) -> None:
        self.options = options
        self.now = now
        self.rng = random.Random(options.seed)  # noqa: S311 - variety, not secrecy
        self._named = 0
        self.ledger = Ledger(options.ledger_size, now)
        self.faults = Faults(self.rng)
        self.timers = Timers(now)
        self.callbacks = CallbackSender(self.timers, options.time_scale)
        self.push_faults = PushFaults(self.faults, self.timers)
        self.lifecycle = Lifecycle(self.timers)

    async def close(self) -> None:
        self.timers.closed = True
        await self.callbacks.close()

    def authenticate(self, key: str, otherwise: Response) -> str:
        """Return the account of a key; raise Refusal with `otherwise` if the key is unknown."""
        keys = self.options.api_keys
        if not key or (keys is not None and key not in keys):
            raise Refusal(otherwise)
        return "everybody" if self.options.one_account else key

    def old(self) -> bool:
        """Return whether the next answer has the older shape."""
        shape = self.options.shape
        return shape == "old" or (shape == "mixed" and self.rng.random() < 0.5)  # noqa: PLR2004 - evens

    def new_id(self) -> str:
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def id_for(self, provider: Provider) -> str:
        """Return a new id; a readable one, such as `fal-1`, if `by_hand` is set."""
        self._named += 1
        return self.new_id() if self.options.by_hand is None else f"{provider}-{self._named}"
