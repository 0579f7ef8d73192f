"""Examines a receiver's surroundings and says, line by line, what is wrong and how to fix it.

It runs in the environment of the receiver, beside a running one or without one. It writes nothing,
submits nothing and costs nothing. All checks run at once; each has its time, and none stops the
others.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import httpx
import msgspec

from receiver.cli.doctor.database import (
    Look,
    check_backlog,
    check_database,
    check_pending,
    check_server_clock,
    look,
)
from receiver.cli.doctor.environment import check_secrets, check_settings, hide
from receiver.cli.doctor.findings import Finding, Findings, fail, in_thread, ok, warn, worst
from receiver.cli.doctor.network import (
    Asker,
    Echoes,
    Running,
    Trouble,
    check_clock,
    check_provider,
    check_public_url,
    check_stream,
)
from receiver.deliveries.registry import Registry
from receiver.deliveries.registry import look as look_at_handlers
from receiver.predictions.tokens import Tokens
from receiver.providers import make_providers
from receiver.providers.adapter import Streamed
from receiver.providers.egress import outward
from receiver.settings import Caller, Settings
from receiver.settings.development import secret_file
from receiver.settings.tls import check as check_tls
from receiver.settings.tls import untold

__all__ = ["Finding", "examine", "worst"]

_LONGEST: Final = 10.0
"""Seconds for one check."""

Check: TypeAlias = Callable[[], Awaitable[Findings]]


async def examine(
    env: Mapping[str, str], *, clock: Callable[[], float] = time.time
) -> list[Finding]:
    """Make every check, and give what was found in the order in which it should be fixed."""
    settings, problems, names = Settings.look(env)
    caller, more = Caller.look(env)
    problems = list(dict.fromkeys([*problems, *more]))
    broken = {problem.partition(":")[0].split(" ")[0] for problem in problems}
    verify = untold() if check_tls(env) else None
    # By the proxies and the authorities that the receiver goes by.
    async with httpx.AsyncClient(
        transport=outward(settings.proxies, verify),
        trust_env=False,
        headers={"Accept-Encoding": "identity"},
    ) as client:
        checkup = _Checkup(caller, settings, broken, Asker(client, clock), clock)
        checks: list[tuple[str, Check]] = [
            ("settings", _now(lambda: check_settings(env, settings, problems, names))),
            ("secrets", _now(lambda: check_secrets(caller, settings))),
            *checkup.checks(),
        ]
        try:
            found = await asyncio.gather(*(_bounded(name, check) for name, check in checks))
        finally:
            await checkup.end()
    return [
        msgspec.structs.replace(
            finding,
            says=hide(finding.says, settings, caller),
            fix=hide(finding.fix, settings, caller),
        )
        for findings in found
        for finding in findings
    ]


def _now(check: Callable[[], Findings]) -> Check:
    async def run() -> Findings:
        return check()

    return run


async def _bounded(name: str, check: Check) -> Findings:
    try:
        async with asyncio.timeout(_LONGEST):
            return await check()
    except TimeoutError:
        return [fail(name, f"the check did not end within {_LONGEST:g} s", "see what it waits for")]
    except Exception as error:  # noqa: BLE001 - no check may stop the others
        said = f"the check itself failed: {type(error).__name__}: {error}"
        return [fail(name, said, "please report it")]


class _Checkup:
    """What several checks want to know is asked once, and each waits for it."""

    def __init__(
        self,
        caller: Caller,
        settings: Settings,
        broken: set[str],
        asker: Asker,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._broken = broken
        self._asker = asker
        self._providers = make_providers(settings.providers)
        keys = _secret_keys(settings)
        self._echoes = Echoes(asker, Tokens(keys), clock) if keys else None
        self._running = Running(asker, caller)
        self._look = asyncio.create_task(look(settings))
        self._here = asyncio.create_task(self._ask_here())
        self._asked = {
            name: asyncio.create_task(check_provider(provider, settings, asker))
            for name, provider in self._providers.items()
        }

    def checks(self) -> list[tuple[str, Check]]:
        streamed = [
            (name, provider)
            for name, provider in self._providers.items()
            if isinstance(provider, Streamed) and self._settings.providers[name].key is not None
        ]
        named: list[tuple[str, Check]] = [
            ("receiver", self._receiver),
            ("public url", self._public_url),
            *((f"provider {name}", _await(task)) for name, task in self._asked.items()),
            *(
                (f"stream {name}", lambda n=name, p=provider: check_stream(n, p, self._asker))
                for name, provider in streamed
            ),
            ("clock", self._clocks),
            ("handlers", self._handlers),
        ]
        if "RECEIVER_DATABASE_URL" not in self._broken:
            named[:0] = [("database", self._database), ("backlog", self._backlog)]
        return named

    async def end(self) -> None:
        tasks: list[asyncio.Task[Any]] = [self._look, self._here, *self._asked.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_here(self) -> list[Trouble | None] | None:
        return await self._echoes.by_each_key(self._running.url) if self._echoes else None

    async def _database(self) -> Findings:
        return check_database(await asyncio.shield(self._look), self._settings)

    async def _backlog(self) -> Findings:
        return check_backlog(await self._looked())

    async def _looked(self) -> Look | None:
        """Return the look at the database; None where another check tells why there is none."""
        if "RECEIVER_DATABASE_URL" in self._broken:
            return None
        with contextlib.suppress(Exception):
            return await asyncio.shield(self._look)
        return None

    async def _receiver(self) -> Findings:
        troubles = await asyncio.shield(self._here)
        if troubles is None:
            said = "not asked, as there is no secret key to know it by"
            return [warn("receiver", said, "set RECEIVER_SECRET_KEY")]
        return await self._running.check(troubles, self._settings)

    async def _public_url(self) -> Findings:
        if "RECEIVER_PUBLIC_URL" in self._broken:
            return []
        return await check_public_url(self._settings, self._echoes, self._is_absent)

    async def _is_absent(self) -> bool:
        troubles = await asyncio.shield(self._here)
        return troubles is not None and all(troubles)

    async def _clocks(self) -> Findings:
        """Compare ours with all those that the other checks get to see."""
        await asyncio.wait([*self._asked.values()])
        return [*check_clock(self._asker.skews), *check_server_clock(await self._looked())]

    async def _handlers(self) -> Findings:
        registry, found = await in_thread(lambda: _load(self._settings.handlers))
        found += check_pending(await self._looked(), registry)
        if registry.handlers or found:
            return found or [ok("handlers", f"{', '.join(registry.handlers)}: loaded")]
        fix = "name files or modules in RECEIVER_HANDLERS, or give them to the doctor as to serve"
        return [warn("handlers", "there is none: outcomes are recorded, and that is all", fix)]


def _await(task: asyncio.Task[Findings]) -> Check:
    async def run() -> Findings:
        return await asyncio.shield(task)

    return run


def _secret_keys(settings: Settings) -> list[str]:
    """Return the secret keys; in development, the one that a receiver made up here."""
    if settings.secret_keys or not settings.dev:
        return [key.reveal() for key in settings.secret_keys]
    with contextlib.suppress(OSError):
        return [secret_file(settings).read_text()]
    return []


def _load(names: Sequence[str]) -> tuple[Registry, Findings]:
    """Load the handlers as `serve` does; what they print on the way is no part of the report."""
    with contextlib.redirect_stdout(sys.stderr):
        registry, problems = look_at_handlers(names)
    fix = "fix it: `receiver serve` would not start"
    found = [fail("handlers", line, fix) for text in problems for line in text.splitlines()]
    found += [
        warn(
            "handlers",
            f"{name} is to run after {other}, which is no handler here: it will not wait",
            "name its file too, or correct the name",
        )
        for name, other in registry.strangers()
    ]
    return registry, found
