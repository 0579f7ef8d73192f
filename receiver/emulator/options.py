"""Options of the emulator."""

from typing import Literal

import msgspec

from receiver.emulator.endings import Ending

Provider = Literal[
    "oxen", "eachlabs", "fal", "replicate", "ideogram", "bfl", "wavespeed", "openrouter"
]
Shape = Literal["new", "old", "mixed"]


class Schedule(msgspec.Struct, frozen=True):
    """When a provider tries a callback, and when it stops; all in seconds."""

    waits: tuple[float, ...]
    first_timeout: float
    later_timeout: float
    lifetime: float = float("inf")
    """No attempt is made after this; fal stops when the stored result expires."""
    lifetime_large: float = float("inf")
    """The same for bodies of 10 KB and more."""
    redirect_is_final: bool = False


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How the providers behave when no prompt and no fault says otherwise."""

    generation: float = 0.8
    """Seconds a picture takes; a fifth of them are spent queued."""
    jitter: float = 0.25
    """Share by which each generation may be shorter or longer."""
    shape: Shape = "new"
    """Generation of the wire shapes; `mixed` draws one for each prediction."""
    keep_alive: float = 15
    """Seconds between comments on an event stream."""
    stray_events: float = 0.05
    """Chance that Oxen's stream carries an unrelated event before one of ours."""
    time_scale: float = 1
    """Multiplies every wait of the callback schedules; their timeouts stay as they are."""
    fal_sources: tuple[str, ...] = ("127.0.0.0/8", "::1/128")
    """Ranges that fal says its callbacks come from; ours do come from this machine."""
    eachlabs_in_flight: int | None = 10
    """Unfinished predictions per key; None lifts the limit."""
    eachlabs_shut: float = 0
    """Seconds for which a submit that was refused for that limit keeps its key shut out."""
    eachlabs_per_minute: int | None = 100
    """Requests of every kind per key and minute; None lifts the limit."""
    replicate_per_minute: int | None = 600
    """Submits per key and minute; None lifts the limit."""
    ideogram_in_flight: int | None = 10
    bfl_in_flight: int | None = 24
    """Unfinished predictions per key; None lifts the limit."""
    api_keys: frozenset[str] | None = None
    """Keys that are let in; None lets any non-empty key in."""
    one_account: bool = False
    """All keys are of one account, as a new key is of the same as the one before."""
    ledger_size: int = 200_000
    """Predictions remembered; the oldest are forgotten first."""
    by_hand: Ending | None = None
    """If set, predictions end only by `EmulatedProviders.end`, and so unless it names another."""
    receiver: str = "http://127.0.0.1:8000"
    """The address of the app that the chat platforms call, at `/in/slack` and so on."""
    own: str = "http://127.0.0.1:8001"
    """The emulator's own address, for what the chat platforms hand out."""
    seed: int | None = None
    """Makes ids, jitter, shapes and signing keys repeatable."""
