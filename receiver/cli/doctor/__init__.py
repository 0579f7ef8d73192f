"""`receiver doctor`: check what a receiver depends on; each problem has its fix.

It runs in the environment of the receiver, whether or not a receiver is running. It writes nothing,
submits nothing and costs nothing. All checks run at once, each with a time limit, and none stops
the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import isawaitable
from operator import attrgetter
from typing import Final, TypeAlias

import httpx
import msgspec

from receiver.cli.doctor.chats import CHECKS as CHATS
from receiver.cli.doctor.chats import check_chat
from receiver.cli.doctor.database import (
    DatabaseState,
    check_backlog,
    check_clocks,
    check_pending,
    inspect_database,
)
from receiver.cli.doctor.environment import check_secrets, check_settings, hide
from receiver.cli.doctor.findings import Finding, Findings, fail, ok, warn, worst
from receiver.cli.doctor.network import (
    Echoes,
    Prober,
    check_any_key,
    check_provider,
    check_public_url,
    check_receiver,
)
from receiver.deliveries.importing import load_and_check
from receiver.deliveries.registry import Registry
from receiver.predictions.tokens import Tokens
from receiver.providers import NAMES
from receiver.settings import Caller, Listening, Settings, advice
from receiver.settings.development import secret_file
from receiver.settings.egress import outward
from receiver.settings.tls import certifi_context
from receiver.settings.tls import check as check_tls

__all__ = ["Finding", "examine", "worst"]

_LONGEST: Final = 10.0
"""Time limit of one check, in seconds."""

Check: TypeAlias = Callable[[], Findings | Awaitable[Findings]]


async def examine(
    env: Mapping[str, str],
    handlers: Sequence[str] | None = None,
    *,
    clock: Callable[[], float] = time.time,
) -> list[Finding]:
    """Run every check; return the findings in the order in which to fix them.

    `handlers` are those given to the command, instead of RECEIVER_HANDLERS.
    """
    settings, problems = Settings.parse(env)
    settings = replace(settings, handlers=tuple(handlers) if handlers else settings.handlers)
    caller, more = Caller.parse(env)
    problems = list(dict.fromkeys([*problems, *more, *Listening.problems(env)]))
    verify = certifi_context() if check_tls(env) else None
    # With the same proxies and CA bundle as the receiver.
    async with httpx.AsyncClient(
        transport=outward(settings.proxies, verify),
        trust_env=False,
        headers={"Accept-Encoding": "identity"},
    ) as client:
        prober = Prober(client, clock)
        broken = {problem.partition(":")[0].split(" ")[0] for problem in problems}
        echoes = Echoes(prober, Tokens(_secret_keys(settings)))
        # Each is run once; several checks await its result.
        database = asyncio.create_task(_inspect(settings, broken))
        local_echoes = asyncio.create_task(echoes.by_each_key(caller.url))
        checks: list[tuple[str, Check]] = [
            ("settings", partial(check_settings, env, settings, problems)),
            ("secrets", partial(check_secrets, caller, settings)),
            ("database", partial(_with_database, database, attrgetter("findings"))),
            ("backlog", partial(_with_database, database, check_backlog)),
            ("receiver", partial(check_receiver, local_echoes, caller, settings, prober)),
            ("public url", partial(check_public_url, settings, broken, echoes, local_echoes)),
            ("providers", partial(check_any_key, settings)),
            *(
                (f"provider {name}", partial(check_provider, provider, settings, prober))
                for name, provider in settings.adapters().items()
            ),
            *((name, partial(check_chat, name, env, settings, prober)) for name in CHATS),
            ("handlers", partial(_check_handlers, settings, database)),
        ]
        results = await asyncio.gather(*(_bounded(name, check) for name, check in checks))
        # Last: the other checks have compared the clocks by now.
        clocks = partial(_with_database, database, check_clocks, prober.skews)
        results.append(await _bounded("clock", clocks))
    return [
        msgspec.structs.replace(
            finding,
            says=hide(finding.says, settings, caller),
            fix=hide(finding.fix, settings, caller),
        )
        for findings in results
        for finding in findings
    ]


async def _bounded(name: str, check: Check) -> Findings:
    try:
        async with asyncio.timeout(_LONGEST):
            made = check()
            findings = await made if isawaitable(made) else made
    except TimeoutError:
        text = f"the check did not end within {_LONGEST:g} s"
        findings = [fail(text, "run the doctor again; a server that it calls may hang")]
    except Exception as error:  # noqa: BLE001 - no check may stop the others
        text = f"the check itself failed: {type(error).__name__}: {error}"
        findings = [fail(text, "please report this as a bug")]
    return [msgspec.structs.replace(each, name=each.name or name) for each in findings]


async def _inspect(settings: Settings, broken: Collection[str]) -> DatabaseState:
    if "RECEIVER_DATABASE_URL" in broken:  # as the settings' check reports
        return DatabaseState()
    return await inspect_database(settings)


async def _with_database(
    database: Awaitable[DatabaseState], check: Callable[..., Findings], *given: object
) -> Findings:
    """Run a check on the state of the database."""
    return check(await database, *given)


async def _check_handlers(settings: Settings, database: Awaitable[DatabaseState]) -> Findings:
    registry, problems = await asyncio.to_thread(_load, settings.handlers)
    fix = "fix it: `receiver serve` would not start"
    # Only the first line, which names the place in the source; the next lines quote it.
    findings = [fail(text.partition("\n")[0], fix) for text in problems]
    for fix, found in (
        (_CORRECT, registry.warnings(NAMES)),
        (_KEEP, advice.short_lived(settings, registry.handlers)),
        (_ORDER, advice.nothing_to_order(settings, registry.handlers)),
    ):
        findings += [warn(problem, fix) for problem in found]
    findings += check_pending(await database, registry)
    if not findings:
        findings = [ok(f"{', '.join(registry.handlers)}: loaded")]
    return findings + [ok(f"/in/{name}: served", name="routes") for name in registry.routes]


_KEEP: Final = "it stores what is made as soon as it is known (deploy/handlers.md)"
_ORDER: Final = "deploy/recipes.md describes this file"
_CORRECT: Final = "correct the name, or give the doctor the handlers that `receiver serve` gets"


def _secret_keys(settings: Settings) -> list[str]:
    """Return the secret keys; if none is set, in development the one that `serve --dev` made."""
    if settings.secret_keys or not settings.dev:
        return [key.reveal() for key in settings.secret_keys]
    with contextlib.suppress(OSError):
        return [secret_file(settings).read_text()]
    return []


def _load(names: Sequence[str]) -> tuple[Registry, list[str]]:
    """Load the handlers as `serve` does; their output on stdout is redirected to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        return load_and_check(names)
