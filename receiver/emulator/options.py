"""Options of the emulator."""

from typing import Literal

import msgspec

from receiver.emulator.endings import Ending

Provider = Literal[
    "oxen", "eachlabs", "fal", "replicate", "ideogram", "bfl", "wavespeed", "openrouter"
]
Shape = Literal["new", "old", "mixed"]


class Schedule(msgspec.Struct, frozen=True):
    """Timing of a provider's callback attempts, in seconds."""

    waits: tuple[float, ...]
    first_timeout: float
    later_timeout: float
    lifetime: float = float("inf")
    """No attempt is made after this; fal stops when the stored result expires."""
    lifetime_large: float = float("inf")
    """The same for bodies of 10 KB and more."""
    redirect_is_final: bool = False


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Behaviour of the emulated services, unless a prompt or a fault changes it."""

    generation: float = 0.8
    """Seconds for one prediction, a fifth of them in the queue."""
    jitter: float = 0.25
    """Share by which each prediction may take less or more time."""
    shape: Shape = "new"
    """Version of the wire shapes; `mixed` draws one for each prediction."""
    keep_alive: float = 15
    """Seconds between comments on an event stream."""
    stray_events: float = 0.05
    """Probability of an unrelated event in Oxen's stream before that of a prediction."""
    time_scale: float = 1
    """Factor for the waits of the callback schedules; timeouts are unchanged."""
    fal_sources: tuple[str, ...] = ("127.0.0.0/8", "::1/128")
    """IP ranges that fal publishes for its callbacks; the emulator's come from this machine."""
    eachlabs_in_flight: int | None = 10
    """Unfinished predictions per key; None lifts the limit."""
    eachlabs_shut: float = 0
    """Seconds after a refusal for that limit in which all submits of the key are refused."""
    eachlabs_per_minute: int | None = 100
    """Requests of all kinds per key and minute; None lifts the limit."""
    replicate_per_minute: int | None = 600
    """Submits per key and minute; None lifts the limit."""
    ideogram_in_flight: int | None = 10
    bfl_in_flight: int | None = 24
    """Unfinished predictions per key; None lifts the limit."""
    api_keys: frozenset[str] | None = None
    """Accepted keys; None accepts any non-empty key."""
    one_account: bool = False
    """Whether all keys belong to one account, as an old and a new key do."""
    ledger_size: int = 200_000
    """Number of predictions kept; the oldest are dropped first."""
    by_hand: Ending | None = None
    """If set, predictions end only by `EmulatedProviders.end`, by default with this ending."""
    receiver: str = "http://127.0.0.1:8000"
    """URL of the app that the chat platforms call, at `/in/<platform>`."""
    own: str = "http://127.0.0.1:8001"
    """The emulator's own URL, the base of URLs that the chat platforms send."""
    seed: int | None = None
    """Makes ids, jitter, shapes and signing keys repeatable."""
