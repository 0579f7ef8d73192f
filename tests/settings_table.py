"""The table of deploy/settings.md, made from the settings; run as a module, it prints it."""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter

from receiver.settings import all_settings


def settings_table() -> str:
    """Return the table of settings, with one row for settings that share a description."""
    lines = ["| Name | Default | |", "|---|---|---|"]
    for doc, group in groupby(all_settings(), key=attrgetter("doc")):
        found = list(group)
        names = ", ".join(f"`{name}`" for each in found for name in each.names)
        shown = [each.default_shown for each in found]
        lines.append(
            f"| {names} | {', '.join(shown if len({*shown}) > 1 else shown[:1])} | {doc} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(settings_table())  # noqa: T201 - it is a command
