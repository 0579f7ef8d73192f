"""The file of triggers: the proof of each, the order that a call makes, and its conditions."""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from receiver import Table, read_settings

from ._proofs import PROOFS, Proof, read_proof
from ._templates import Condition, Template, Values, conditions, key_of, name_of, template, value_of

NAME = re.compile(r"[a-z0-9]([a-z0-9_-]{0,62}[a-z0-9])?", re.ASCII)
KEYS = {"standard": "{header:webhook-id}", "github": "{header:x-github-delivery}"}
"""By proof: the key that is the same when a sender repeats a call, if the proof defines one."""


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """One trigger: its proof, its conditions, and the order that a call makes."""

    proof: Proof
    key: Template
    recipe: str
    options: Values
    when: tuple[Condition, ...]
    person: Template
    place: Template
    metadata: Values


# --- the file ---


@dataclass(frozen=True)
class Book:
    """The parts of the recipes file that triggers are checked against at the start."""

    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The options of each recipe, by name."""
    allow: Any = None

    def allows(self, person: Template, place: Template) -> bool:
        """Return whether an order could be allowed; values that vary by call are checked later."""
        if not isinstance(self.allow, list | None) or not self.recipes:
            return True
        entries = [entry for entry in self.allow or [] if isinstance(entry, dict)]
        return any(
            all(
                wanted.fixed is None or fnmatchcase(wanted.fixed, str(entry.get(name, "*")))
                for name, wanted in (("person", person), ("place", place))
            )
            for entry in entries
        )


def read_triggers(read: read_settings) -> dict[str, Trigger]:
    """Read the file that TRIGGERS names; add its problems to the settings' problems."""
    book = read_book(read.text("RECEIVER_RECIPES", "the file of recipes", default=""))
    tables = read.tables("TRIGGERS", "the file of triggers, as triggers.toml")
    return {name: read_trigger(name, table, read, book) for name, table in tables.items()}


def read_book(path: str) -> Book:
    """Read the recipes; the receiver itself reports problems in their file."""
    try:
        found = tomllib.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return Book()
    tables = {name: table for name, table in found.items() if isinstance(table, dict)}
    options = {name: table.get("options", {}) for name, table in tables.items()}
    known = {name: each for name, each in options.items() if isinstance(each, dict)}
    return Book(known, found.get("allow"))


def read_trigger(name: str, table: Table, read: read_settings, book: Book) -> Trigger:
    if not NAME.fullmatch(name):
        table.refuse(
            "a name is of small letters, digits, - and _, 64 at most, with no - or _ at its ends"
        )
    kind = table.choice("proof", PROOFS)
    recipe = table.choice("recipe", book.recipes) if book.recipes else table.text("recipe")
    itself = template(f"trigger:{name}")
    known, options = book.recipes.get(recipe), table.table("options")
    trigger = Trigger(
        proof=read_proof(kind, name, table, read),
        key=read_key(kind, table),
        recipe=recipe,
        options=read_values(options, known),
        when=table.take("when", conditions, ()),
        person=table.take("person", name_of, itself),
        place=table.take("place", name_of, itself),
        metadata=read_values(table.table("metadata")),
    )
    table.end()
    for option, spec in (known or {}).items():
        if isinstance(spec, dict) and spec.get("required") and not options.has(option):
            options.refuse(f"{option} is missing, and {recipe} needs it")
    if not book.allows(trigger.person, trigger.place):
        place = trigger.place.fixed or "…"
        table.refuse(f'the recipes allow nobody here: add [[allow]] with place = "{place}"')
    return trigger


def read_key(kind: str, table: Table) -> Template:
    if kind not in KEYS and not table.has("key"):
        table.refuse(
            "key is missing: what is the same when a call is repeated, as "
            '"{id}", "{header:idempotency-key}" or "{header:ce-source}/{header:ce-id}"'
        )
    return table.take("key", key_of, template(KEYS.get(kind, "")))


def read_values(table: Table, names: Mapping[str, Any] | None = None) -> Values:
    """Read templates; `names` are the known names, if given."""
    known = table.keys() if names is None else names
    found = {name: table.take(name, value_of, None) for name in known}
    table.end()
    return {name: value for name, value in found.items() if value is not None}
