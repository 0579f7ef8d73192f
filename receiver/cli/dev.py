"""`receiver serve` in development: `.env`, emulated providers, a banner, reloads."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import structlog
import typer
from starlette.applications import Starlette

from receiver.app import create_app, migrate
from receiver.cli.client import Client
from receiver.cli.emulating import EMULATOR, RECEIVER, chats_of, emulated, environment
from receiver.cli.environment import settings as read_settings
from receiver.cli.output import program
from receiver.deliveries.importing import load, loaded_files, reload
from receiver.deliveries.registry import Registry
from receiver.http.listening import listening, url_of
from receiver.http.server import Server
from receiver.model.errors import HandlerError, ReceiverError, SettingsError, StoreUnavailable
from receiver.model.tasks import TaskSet
from receiver.model.text import spelled
from receiver.observability import logging as logs
from receiver.providers import DECLARED, NAMES
from receiver.settings import Settings, development, env_file
from receiver.settings.toml import files_read

log = structlog.get_logger("receiver")

_PICTURE: Final = 0.8
"""Seconds that an emulated picture takes."""
_CHECK_INTERVAL: Final = 0.5
"""Seconds between two checks of the files."""
_SETTLE: Final = 0.2
"""Seconds from a change to the reload, as an editor may still be writing or replacing files."""
_BOLD: Final = None if os.environ.get("NO_COLOR") else True
_RECIPES: Final = Path(__file__).with_name("project") / "recipes.toml.txt"
"""The recipes for emulated providers if RECEIVER_RECIPES is not set."""


def serve(
    handlers: Sequence[str],
    host: str,
    port: int,
    *,
    dispatch: bool,
    dev: bool,
    emulate: bool,
    reloads: bool,
    tries: bool,
) -> None:
    """Run the receiver until a signal arrives; `emulate` includes `dev`.

    Raises ReceiverError, with the problem, before anything is started.
    """
    if dev or emulate:
        os.environ["RECEIVER_DEV"] = "1"
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # our log and the banner contain it
    sys.dont_write_bytecode = True  # stale for a file that is edited twice in a second
    with ExitStack() as stack:
        sockets = stack.enter_context(listening(host, port))
        url, emulator = url_of(sockets[0]), ""
        settings = read_settings(handlers, dev=dev or emulate)
        if emulate:
            if not os.environ.get("RECEIVER_RECIPES", "").strip():
                os.environ["RECEIVER_RECIPES"] = str(_RECIPES)
            emulator = stack.enter_context(emulated(_PICTURE, url))
            os.environ.update(chats_of(emulator, os.environ))  # where handlers read them
            settings = _among_emulated(settings, url, emulator)
        registry = load(settings.handlers)  # first, so that a wrong name creates no database
        app = create_app(settings, registry.all(), dispatch=dispatch)
        asyncio.run(migrate(settings))
        watch = _Watch(app, settings)

        async def started() -> None:
            _print_banner(_banner(settings, registry, url, emulator, reloads=reloads))
            if (dev or emulate) and env_file.is_open():
                log.warning(
                    "settings.warning", problem=".env can be read by other users: chmod 600 .env"
                )
            if tries:
                await asyncio.to_thread(_try, settings, url)
            if reloads and (settings.handlers or files_read):
                await watch.run()

        _Server(app, host, port, started).run(sockets)


def _among_emulated(settings: Settings, receiver: str, providers: str) -> Settings:
    """Return settings that use only emulated providers, and a database of their own.

    The secrets are kept, so that commands find their key. The database is separate because an
    emulated provider would report real predictions as unknown.
    """
    kept = {
        name: value for name, value in os.environ.items() if not name.endswith("_ALLOWED_SOURCES")
    }
    made = Settings.read({**kept, **environment(providers, receiver)})
    path = Path(settings.sqlite_path or "receiver.db").with_suffix(".emulated.db")
    return replace(
        made,
        handlers=settings.handlers,
        secret_keys=development.with_secrets(settings).secret_keys,
        database_url=f"sqlite:///{path}",
    )


class _Server(Server):
    """A server that runs a task, `started`, from its startup to its shutdown."""

    def __init__(
        self,
        app: Starlette,
        host: str,
        port: int,
        started: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        super().__init__(app, host, port)
        self._started = started
        self._tasks = TaskSet()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tasks.start(self._started(), "development")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._tasks.cancel()
        await super().shutdown(sockets)


# --- the banner ---


def _banner(
    settings: Settings, registry: Registry, url: str, emulator: str, *, reloads: bool
) -> list[tuple[str, str]]:
    calls = "emulated providers call" if emulator else "providers call"
    callbacks = f"on: {calls} {settings.public_url}"
    if settings.public_url is None:
        callbacks = "off: outcomes come by stream and poll, as RECEIVER_PUBLIC_URL is not set"
    names = ", ".join(registry.handlers) or "none"
    ways = ", ".join(f"/in/{name}" for name in registry.routes)
    again = ", reloaded when a file changes" if reloads and settings.handlers else ""
    return [
        ("API", f"{url}/v1, docs at {url}/docs"),
        *([("Dashboard", _dashboard(settings, url))] if settings.shows_dashboard else []),
        ("Callbacks", callbacks),
        ("Handlers", f"{names}{again}"),
        *([("Ways in", ways)] if ways else []),
        *([("Chat", _chat(emulator))] if emulator else []),
        ("Try", _submit(settings, url)),
    ]


def _dashboard(settings: Settings, url: str) -> str:
    """Return the dashboard's URL and how to sign in; a generated key is shown nowhere else."""
    keys = "a key of RECEIVER_API_KEYS"
    if not settings.api_keys:
        keys = development.with_secrets(settings).api_keys[-1].reveal()
    return f"{url}/ui, sign in by {keys}"


def _chat(emulator: str) -> str:
    """Return a command that opens a chat with the handlers, in another terminal."""
    where = "" if emulator == EMULATOR else f" --emulator {emulator}"
    return f"{program()} chat{where}"


def _submit(settings: Settings, url: str) -> str:
    """Return a submit command for another terminal in this folder, or how to enable a provider."""
    on = [name for name in DECLARED if settings.providers[name].key is not None]
    if not on:
        return f"--emulate; or set one of {', '.join(each.key for each in DECLARED.values())}"
    where = "" if url == RECEIVER else f"RECEIVER_URL={url} "
    what = f'{on[0]} {DECLARED[on[0]].example} prompt="a lighthouse"'
    return f"{where}{program()} submit {what} --wait"


def _print_banner(lines: Sequence[tuple[str, str]]) -> None:
    logs.flush()
    width = shutil.get_terminal_size().columns
    for name, text in lines:
        shown = spelled(text)
        is_copied = name in {"Chat", "Dashboard", "Try"}  # never cut, as it is copied
        if not is_copied and len(shown) > width - 12:
            shown = f"{shown[: width - 13]}…"
        typer.secho(f"  {name:<9} ", nl=False, err=True, bold=_BOLD)
        typer.echo(shown, err=True)


def _try(settings: Settings, url: str) -> None:
    """Submit a first prediction to each provider that has a key."""
    key = development.with_secrets(settings).api_keys[0].reveal()
    try:
        with Client({"RECEIVER_URL": url, "RECEIVER_API_KEY": key}) as client:
            for provider, declared in DECLARED.items():
                if settings.providers[provider].key is not None:
                    given = {"prompt": f"a lighthouse, by {provider}"}
                    client.submit(provider, declared.example, given)
    except ReceiverError as error:
        log.warning("settings.warning", problem=f"nothing could be submitted: {error}")


# --- reloading ---


class _Watch:
    """A watcher that reloads handlers, recipes and prices when one of their files changes.

    If a reload fails, the earlier ones stay in use.
    """

    def __init__(self, app: Starlette, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._names = settings.handlers
        self._is_broken = False
        """Whether the last reload failed: then all Python files beside them are watched too."""
        self._seen = self._stamps()
        """The time and size of each file when it was loaded; None: it did not exist."""

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_INTERVAL)
            if self._stamps() == self._seen:
                continue
            await asyncio.sleep(_SETTLE)
            before = self._stamps()
            await self._reload()
            # A file that changed during the reload is reloaded in the next round.
            after = self._stamps()
            self._seen = {file: before.get(file, stamp) for file, stamp in after.items()}

    async def _reload(self) -> None:
        try:
            read = Settings.read(os.environ)
            registry = await asyncio.to_thread(reload, self._names)
        except (HandlerError, SettingsError) as error:
            self._is_broken = True
            log.error("handlers.kept", exception=str(error))  # noqa: TRY400 - no traceback
            return
        self._is_broken = False
        for problem in registry.warnings(NAMES):
            log.warning("settings.warning", problem=problem)
        settings = replace(self._settings, recipes=read.recipes, prices=read.prices)
        with suppress(StoreUnavailable):  # which is logged already
            await self._app.state.exchange(registry, settings)
        recipes = list(settings.recipes.recipes)
        log.info("handlers.reloaded", handlers=list(registry.handlers), recipes=recipes)

    def _stamps(self) -> Mapping[Path, tuple[int, int] | None]:
        """Return the time and size of each file; None: it does not exist."""
        files = loaded_files(self._names) | files_read
        files |= {Path(name).absolute() for name in self._names if name.endswith(".py")}
        if self._is_broken:
            files |= {found for file in list(files) for found in file.parent.glob("*.py")}
        return {file: _stamp(file) for file in files}


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
