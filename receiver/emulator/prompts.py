"""The plan of a prediction, from the words in square brackets in its prompt."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from receiver.emulator.endings import Ending, Failure
from receiver.emulator.options import Options

QUEUED_SHARE = 0.2
"""Share of a prediction's time that is spent in the queue."""
_PACE = {"[fast]": 0.0, "[slow]": 10.0}
_FAILURES: dict[str, Failure] = {
    "[fail]": "model",
    "[moderated]": "moderated",
    "[timeout]": "timeout",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """The times and the ending planned for one prediction; times in seconds."""

    queued: float
    running: float | None
    """None: it never ends by itself."""
    ending: Ending

    @property
    def failure(self) -> Failure | None:
        return self.ending.failure


def read(prompt: str, inputs: Mapping[str, Any], options: Options, rng: random.Random) -> Plan:
    """Return the plan of a prediction with this input."""
    if options.by_hand is not None:
        return Plan(0, None, options.by_hand)
    seconds = options.generation * rng.uniform(1 - options.jitter, 1 + options.jitter)
    seconds *= next((pace for word, pace in _PACE.items() if word in prompt), 1.0)
    running = None if "[never]" in prompt else seconds * (1 - QUEUED_SHARE)
    return Plan(seconds * QUEUED_SHARE, running, Ending(_failure(prompt, inputs)))


def _failure(prompt: str, inputs: Mapping[str, Any]) -> Failure | None:
    if not prompt and not any("image" in name or "video" in name for name in inputs):
        return "prompt"
    return next((failure for word, failure in _FAILURES.items() if word in prompt), None)
