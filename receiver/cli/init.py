"""`receiver init`: the files of a project to start from."""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import tempfile
from pathlib import Path
from typing import Final

from receiver.cli.output import program, say
from receiver.providers import DECLARED

_HANDLERS: Final = '''\
"""What is done with each outcome."""

from receiver import Context, Event, on


@on("succeeded", name="announce")
async def announce(event: Event, ctx: Context) -> None:
    for output in event.prediction.output or []:
        print(f"attempt {ctx.attempt}: {event.prediction.model} made {output.url:.120}", flush=True)
'''
_TEST: Final = """\
from receiver.testing import make_event

from my_handlers import announce

EVENT = make_event("succeeded", output=["https://cdn.example/a.png"])


def test_a_picture_is_announced_though_its_callback_is_lost(receiver_kit, capsys) -> None:
    assert receiver_kit(announce).lose_callback(EVENT).delivery.state == "done"
    assert "made https://cdn.example/a.png" in capsys.readouterr().out
"""
_ENV: Final = """\
# Read by `receiver serve --dev`, by docker compose, and for the key by commands in this folder.
# Keep this file secret: its keys submit at your cost. .gitignore keeps it out of git.
RECEIVER_SECRET_KEY={secret_key}
RECEIVER_API_KEYS={api_key}
RECEIVER_HANDLERS=my_handlers.py
# The address by which providers reach you, a tunnel's for example; without it they are asked:
# RECEIVER_PUBLIC_URL=https://hooks.example.org
# The keys of those that you use:
{keys}
"""
_REQUIREMENTS: Final = """\
# What is installed where this runs; a wheel in this folder, too:
# ./prediction_receiver-0.1.0-py3-none-any.whl[postgres,storage]
prediction-receiver[postgres,storage]
"""
_DOCKERFILE: Final = """\
# The receiver with your handlers. There is no ENTRYPOINT, as platforms differ in whether their
# commands replace one.
ARG BASE=python:3.13-slim
FROM ${BASE}
WORKDIR /app
RUN useradd --uid 10001 --create-home receiver && mkdir /data && chown receiver /data
COPY requirements.txt *.whl ./
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
USER 10001
ENV PORT=8000
EXPOSE 8000
CMD ["receiver", "serve"]
"""
_COMPOSE: Final = """\
services:
  receiver:
    build: .
    env_file: .env
    environment:
      RECEIVER_DATABASE_URL: sqlite:////data/receiver.db
    volumes:
      - data:/data
    ports:
      - "127.0.0.1:8000:8000"
    restart: unless-stopped
    stop_grace_period: 15s

volumes:
  data:
"""
_IGNORED: Final = """\
.env
*.db
*.db-*
*.db.*
.venv/
__pycache__/
.pytest_cache/
"""
_DOCKER_IGNORED: Final = """\
.env
*.db*
.venv
.git
"""
_PRIVATE: Final = 0o600
_PLAIN: Final = 0o644
_PICTURE: Final = 'fal fal-ai/nano-banana prompt="a lighthouse"'


def init(folder: str) -> None:
    """Write the files that are not there yet, and say what to do next. Raises OSError."""
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    keys = {
        "secret_key": secrets.token_hex(32),
        "api_key": secrets.token_hex(16),
        "keys": "\n".join(f"# {declared.key}=" for declared in DECLARED.values()),
    }
    files = {
        "my_handlers.py": _HANDLERS,
        "test_my_handlers.py": _TEST,
        ".env": _ENV.format_map(keys),
        "requirements.txt": _REQUIREMENTS,
        "Dockerfile": _DOCKERFILE,
        "compose.yaml": _COMPOSE,
        ".gitignore": _IGNORED,
        ".dockerignore": _DOCKER_IGNORED,
    }
    made = {
        name: _write(home / name, text, _PRIVATE if name == ".env" else _PLAIN)
        for name, text in files.items()
    }
    for is_new, word in ((True, "made"), (False, "kept as it was")):
        if names := [name for name, new in made.items() if new is is_new]:
            say(f"{word}: {', '.join(names)}")
    if not made[".gitignore"] and ".env" not in _lines(home / ".gitignore"):
        say("add .env to your .gitignore: it holds secrets")
    serve, submit = next_commands(home)
    say("Next, with emulated providers:")
    say(f"  {serve}")
    say("and in another terminal:")
    say(f"  {submit}")


def next_commands(home: Path) -> tuple[str, str]:
    """Return what serves the project in a folder, and what submits to it, from where one stands."""
    there = f"cd {shlex.quote(str(home))} && " if home.resolve() != Path.cwd() else ""
    called = program(home.absolute())
    return (
        f"{there}{called} serve --emulate --try my_handlers.py",
        f"{there}{called} submit {_PICTURE} --wait",
    )


def _write(path: Path, text: str, mode: int) -> bool:
    """Write a file whole or not at all, unless there is one; return whether it was written."""
    descriptor, part = tempfile.mkstemp(dir=path.parent)  # which only we can read
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            os.fchmod(descriptor, mode)
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
            return True
        return False
    finally:
        Path(part).unlink()


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, UnicodeError):
        return []
