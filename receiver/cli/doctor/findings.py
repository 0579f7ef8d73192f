"""Findings of the checks: one line each, for terminals and scripts."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

import msgspec

Level: TypeAlias = Literal["ok", "warn", "FAIL"]
_ORDER: Final = get_args(Level)


class Finding(msgspec.Struct, frozen=True):
    """One line of the report."""

    level: Level
    name: str
    """What was checked, such as `database` or `provider fal`."""
    says: str
    fix: str = ""
    """How to fix it; empty if nothing is wrong."""

    def __str__(self) -> str:
        return f"{self.name}: {self.says}" + (f"; {self.fix}" if self.fix else "")


Findings: TypeAlias = list[Finding]


def ok(says: str, *, name: str = "") -> Finding:
    """Return a finding that all is well; without a name, it gets the name of its check."""
    return Finding("ok", name, says)


def warn(says: str, fix: str) -> Finding:
    return Finding("warn", "", says, fix)


def fail(says: str, fix: str = "", *, name: str = "") -> Finding:
    return Finding("FAIL", name, says, fix)


def worst(findings: Findings) -> Level:
    return max((found.level for found in findings), key=_ORDER.index, default="ok")
