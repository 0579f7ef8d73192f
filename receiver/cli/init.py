"""`receiver init`: write the files of a new project."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Final

from receiver.cli.output import print_line, program
from receiver.providers import DECLARED
from receiver.settings.development import write_new

_FILES: Final = (
    *("my_handlers.py", "test_my_handlers.py", ".env", "requirements.txt", "Dockerfile"),
    *("compose.yaml", ".gitignore", ".dockerignore"),
)
"""The files to write; in `project/` their names have no dot in front, and `.txt` at the end."""
_PRIVATE: Final = 0o600
_PLAIN: Final = 0o644
_PICTURE: Final = 'fal fal-ai/nano-banana prompt="a lighthouse"'


def init(folder: str) -> None:
    """Write the files that are missing, and print the next commands. Raises OSError."""
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    keys = {
        "secret_key": secrets.token_hex(32),
        "api_key": secrets.token_hex(16),
        "keys": "\n".join(f"# {declared.key}=" for declared in DECLARED.values()),
    }
    made = {
        name: write_new(home / name, _text(name, keys), _PRIVATE if name == ".env" else _PLAIN)
        for name in _FILES
    }
    for is_new, word in ((True, "made"), (False, "kept as it was")):
        if names := [name for name, new in made.items() if new is is_new]:
            print_line(f"{word}: {', '.join(names)}")
    if not made[".gitignore"] and ".env" not in _lines(home / ".gitignore"):
        print_line("add .env to your .gitignore: it holds secrets")
    serve, submit = next_commands(home)
    print_line("Next, with emulated providers:")
    print_line(f"  {serve}")
    print_line("and in another terminal:")
    print_line(f"  {submit}")


def _text(name: str, keys: Mapping[str, str]) -> str:
    project = files("receiver.cli").joinpath("project")
    text = project.joinpath(f"{name.removeprefix('.')}.txt").read_text("utf-8")
    return text.format_map(keys) if name == ".env" else text


def next_commands(home: Path) -> tuple[str, str]:
    """Return the commands that serve a project and submit to it, as run from this folder."""
    there = f"cd {shlex.quote(str(home))} && " if home.resolve() != Path.cwd() else ""
    called = program(home.absolute())
    return (
        f"{there}{called} serve --emulate --try my_handlers.py",
        f"{there}{called} submit {_PICTURE} --wait",
    )


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, UnicodeError):
        return []
