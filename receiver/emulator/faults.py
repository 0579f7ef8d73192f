"""Fault injection: rules with a fault, the predictions or calls it affects, and how often."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import msgspec

from receiver.emulator.chats.board import Platform
from receiver.emulator.options import Provider

Fault = Literal[
    "lose_callback",
    "repeat_callback",
    "delay_callback",
    "reorder_callbacks",
    "early_callback",
    "cut_stream",
    "silence_stream",
    "lose_event",
    "refuse_submit",
    "stall_submit",
    "drop_submit",
    "break_poll",
    "rotate_keys",
    "break_jwks",
    "wrong_signature",
    "stale_timestamp",
    "null_payload",
    "large_output",
    "lock_account",
    "reserve_money",
    "late_success",
    "limit_call",
    "fail_call",
    "drop_call",
    "lose_answer",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)


class Rule(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One fault, and the predictions or the calls to a chat platform that it affects."""

    fault: Fault
    provider: Provider | Platform | None = None
    match: str = ""
    """Part of the prompt or, at a chat platform, of the call's name, such as `chat.`."""
    times: int | None = None
    """How often it still applies; None: always."""
    probability: float = 1
    seconds: float | None = None
    """Duration or age; each fault has its own default."""
    copies: int = 3
    """`repeat_callback`: number of callbacks in all."""
    status: int = 503
    """`refuse_submit`: HTTP status of the answer."""
    retry_after: int | None = None
    """`refuse_submit`, `limit_call`: sent as Retry-After."""
    reason: str = ""
    """`refuse_submit`, `lock_account`: message of the refusal; empty: the usual one."""
    answer: Literal["error", "garbage", "missing"] = "error"
    """`break_poll`, `break_jwks`: HTTP 500, a body that is not JSON, or HTTP 404."""
    size: int = 300_000
    """`large_output`: bytes added to the picture."""

    @property
    def headers(self) -> dict[str, str]:
        """The Retry-After header of a refusal."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}

    def affects(self, fault: Fault, provider: Provider | Platform, prompt: str) -> bool:
        return (
            self.fault == fault
            and self.provider in {None, provider}
            and self.match in prompt
            and self.times != 0
        )


class Faults:
    """Fault injection by the rules in force."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.rules: list[Rule] = []
        self._at_once: dict[Fault, list[Callable[[], None]]] = defaultdict(list)

    def at_once(self, fault: Fault, act: Callable[[], None]) -> None:
        """Register an action to run when a fault is set; the fault then never becomes a rule."""
        self._at_once[fault].append(act)

    def replace(self, rules: Sequence[Rule]) -> None:
        self.rules = [rule for rule in rules if rule.fault not in self._at_once]
        for rule in rules:
            for act in self._at_once.get(rule.fault, ()):
                act()

    def take(self, fault: Fault, provider: Provider | Platform, prompt: str = "") -> Rule | None:
        """Return the fault named in the prompt, or the first rule that applies; count its use."""
        if "[" in prompt and f"[{fault}]" in prompt:
            return Rule(fault=fault)
        for rule in self.rules:
            if rule.affects(fault, provider, prompt) and self._rng.random() < rule.probability:
                rule.times = rule.times and rule.times - 1
                return rule
        return None


def read_rules(body: bytes) -> list[Rule]:
    """Return the rules of a list, of an object with a list under `rules`, or a single rule."""
    document: Any = msgspec.json.decode(body)
    rules = document.get("rules", [document]) if isinstance(document, dict) else document
    return msgspec.convert(rules, list[Rule])
