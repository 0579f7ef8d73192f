"""Settings: one table, read once from the environment; all problems are reported together.

A setting is one line here: its field, its name, its parser, its default and its description, which
the table in `deploy/settings.md` repeats. `ProviderSettings` has the lines of all providers; a
provider's own file declares what differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import unquote, urlsplit

from receiver.model.costs import PriceList
from receiver.model.recipes import Limit, RecipeBook
from receiver.providers import DECLARED
from receiver.providers.adapter import Provider
from receiver.providers.declared import Given
from receiver.settings import keys, limits, platforms, prices, proxies, recipes, tls, traces
from receiver.settings import parsers as parse
from receiver.settings.keys import ApiKey
from receiver.settings.parsers import INLINE, LOOPBACK, SHORTEST_SECRET, After, Network, seconds
from receiver.settings.proxies import Proxies, is_loopback
from receiver.settings.reader import Reader, Secret, checked
from receiver.settings.table import Setting, choice, composed, read_rows, rows, setting

__all__ = [
    "INLINE",
    "LOOPBACK",
    "SHORTEST_SECRET",
    "After",
    "ApiKey",
    "Caller",
    "Listening",
    "Network",
    "ProviderSettings",
    "Reader",
    "Secret",
    "Setting",
    "Settings",
    "all_settings",
    "seconds",
]


EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - only where platforms require it
LEAST_CONNECTIONS: Final = {"server": 6, "serverless": 2}
USUAL_CONNECTIONS: Final = {"server": 9, "serverless": 2}
"""Connections of a process to a PostgreSQL server, by mode."""


@dataclass(frozen=True, kw_only=True)
class ProviderSettings:
    """The keys, the URLs and the limits of one provider."""

    key: Secret | None = setting("{}_KEY", parse.header_safe, None).doc(
        "a provider without a key is off"
    )
    """None: the provider is off for submitting; callbacks of old predictions are still taken."""
    urls: Mapping[str, str] = field(default_factory=dict)
    max_in_flight: int | None = setting("{}_MAX_IN_FLIGHT", parse.limit, None).doc(
        "maximum predictions submitted and not ended; further ones wait as `queued`, in order; "
        "`none`: no limit"
    )
    requests_per_minute: int | None = setting("{}_REQUESTS_PER_MINUTE", parse.limit, None).doc(
        "maximum requests to the provider; `none`: no limit"
    )
    secrets: tuple[Secret, ...] = setting("{}_WEBHOOK_SECRET", parse.secrets, (), shown="none").doc(
        "secret that signs the account's callbacks; several by comma, newest first. If it is "
        "not set, it is fetched from the provider; a provider that does not return it "
        "(OpenRouter) is polled"
    )
    admin_key: Secret | None = setting("{}_ADMIN_KEY", parse.header_safe, None).doc(
        "key for the billing API, which has the cost of each prediction; for fal.ai a key of "
        "scope ADMIN"
    )
    confirm: bool = setting("{}_CONFIRM", parse.switch, False).doc("")
    allowed_sources: tuple[Network, ...] | Literal["meta"] | None = setting(
        "{}_ALLOWED_SOURCES", parse.networks, None, shown="anywhere"
    ).doc(
        "addresses and ranges that callbacks may come from; for fal.ai also `meta`: the "
        "ranges that it publishes"
    )


_REAL: Final = "the provider's own"
_REACHED: Final = {
    False: "URL of this part of the API",
    True: "base URL of the API, with or without the path that its SDK adds, such as `/v1`",
}


def _rows_of(provider: str) -> dict[str, Setting]:
    """Return the lines of one provider, by field; those of its URLs by `urls.base` and so on."""
    prefix = provider.upper()
    declared = DECLARED[provider]
    lines: dict[str, dict[str, Any]] = {
        "key": {"names": (declared.key,)},
        "max_in_flight": {"default": declared.max_in_flight},
        "requests_per_minute": {"default": declared.requests_per_minute},
        "secrets": {
            "names": (declared.secret,),
            "parse": partial(parse.account_secrets, declared.secret_begins),
        },
        "admin_key": {"names": (declared.admin_key,)},
        "confirm": {"doc": declared.confirm},
        "allowed_sources": {"parse": parse.sources if declared.read_sources else parse.networks},
    }
    found = {
        at: row._replace(names=(row.names[0].format(prefix),))._replace(**lines[at])
        for at, row in rows(ProviderSettings).items()
    }
    has = {"secrets": declared.secret, "admin_key": declared.admin_key, "confirm": declared.confirm}
    found = {at: row for at, row in found.items() if has.get(at, True)}
    for part, default in declared.urls.items():
        parser = partial(parse.base_url, declared.path) if part == "base" else parse.url
        name = f"{prefix}_{part.upper()}_URL"
        found[f"urls.{part}"] = Setting((name,), parser, default, _REACHED[part == "base"], _REAL)
    return found


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole configuration; `Settings.read(os.environ)` makes one."""

    secret_keys: tuple[Secret, ...] = setting(
        "RECEIVER_SECRET_KEY", parse.strong_secrets, (), shown="required"
    ).doc(f"{SHORTEST_SECRET} characters or more; several by comma, newest first")
    """Empty only in development, before a key is generated."""
    api_keys: tuple[ApiKey, ...] = composed(
        ("RECEIVER_API_KEYS",), keys.api_keys, (), shown="none: `/v1` closed"
    ).doc(
        "keys for `/v1`, by comma; each may have a name (`web:…,bot:…`), for costs and limits "
        "by key"
    )
    viewer_keys: tuple[ApiKey, ...] = setting("RECEIVER_VIEWER_KEYS", keys.keys, ()).doc(
        "keys that may only read `/v1` and the dashboard, by comma, with or without names"
    )
    public_url: str | None = setting(
        "RECEIVER_PUBLIC_URL", parse.url, None, shown="none: no callbacks"
    ).doc("public base URL, to which providers send callbacks")
    database_url: str = setting(
        "RECEIVER_DATABASE_URL",
        parse.database_url,
        "sqlite:///receiver.db",
        shown="`sqlite:///receiver.db`",
        is_secret=True,
    ).doc(
        "SQLite file (four slashes for an absolute path), or `postgresql://user:password@host/name`"
    )
    """It may hold a password: show `database` instead."""
    database_pooled: Literal["auto", "on", "off"] = choice(
        "RECEIVER_DATABASE_POOLED", ("auto", "on", "off"), "auto"
    ).doc(
        "whether PostgreSQL is behind a pooler in transaction mode; `auto`: detected by the "
        "URL or a test at the start, and always assumed in serverless mode"
    )
    migrate_url: str | None = setting(
        "RECEIVER_MIGRATE_URL",
        parse.migrate_url,
        None,
        shown="`RECEIVER_DATABASE_URL`",
        is_secret=True,
    ).doc(
        "URL of the same database without a pooler, to create and migrate the schema "
        "(`receiver migrate`)"
    )
    database_connections: int | None = setting(
        "RECEIVER_DATABASE_CONNECTIONS",
        parse.whole,
        None,
        shown="{server}; in serverless mode {serverless}".format_map(USUAL_CONNECTIONS),
    ).doc(
        f"maximum connections of a process to PostgreSQL, {LEAST_CONNECTIONS['server']} or more "
        f"({LEAST_CONNECTIONS['serverless']} in serverless mode)"
    )
    platform: str | None = composed(platforms.NAMES, platforms.read_platform, None).doc(
        "set by platforms whose local disks are lost with the process: SQLite is refused "
        "there, unless its file is on a mounted disk"
    )
    """The one of these variables that is set."""
    handlers: tuple[str, ...] = setting("RECEIVER_HANDLERS", parse.texts, ()).doc(
        "handlers to load: files, modules or installed names, by comma"
    )
    max_body_bytes: int = setting("RECEIVER_MAX_BODY_BYTES", parse.whole, 4 * 1024 * 1024).doc(
        "maximum size of a callback or request"
    )
    limit_unproved_per_minute: int | None = setting(
        "RECEIVER_LIMIT_UNPROVED_PER_MINUTE", parse.limit, 600
    ).doc(
        "failed requests (bad signature or key, unknown path, too large, …) of one address "
        "(IPv6: /64) and of one callback URL; `none` lifts a limit"
    )
    limit_callbacks_per_minute: int | None = setting(
        "RECEIVER_LIMIT_CALLBACKS_PER_MINUTE", parse.limit, None
    ).doc("verified callbacks of one provider, in one process")
    limit_api_per_minute: int | None = setting(
        "RECEIVER_LIMIT_API_PER_MINUTE", parse.limit, None
    ).doc("`/v1` requests of one address with a valid key")
    root_path: str | None = setting(
        "RECEIVER_ROOT_PATH", parse.path, None, shown="that of `RECEIVER_PUBLIC_URL`"
    ).doc("path prefix that the proxy or platform in front does not remove: a stage, `/api`")
    trusted_proxies: tuple[Network, ...] | Literal["platform"] = setting(
        "RECEIVER_TRUSTED_PROXIES", parse.trusted, LOOPBACK, shown="`127.0.0.0/8, ::1`"
    ).doc(
        "addresses and ranges of proxies whose `X-Forwarded-For` is trusted; `none`; "
        "`platform`: trust the nearest hop, if only the platform's own proxy can reach the "
        "receiver"
    )
    poll_after: float | None = setting("RECEIVER_POLL_AFTER", parse.seconds, None, shown="30").doc(
        "seconds until the first poll if a callback or stream event is expected (3 if not)"
    )
    prediction_timeout: float = setting("RECEIVER_PREDICTION_TIMEOUT", parse.seconds, 3600.0).doc(
        "seconds from the first submit to the deadline"
    )
    retry_attempts: int = setting("RECEIVER_RETRY_ATTEMPTS", parse.whole, 10).doc(
        "maximum attempts of a handler for one event"
    )
    retry_base: float = setting("RECEIVER_RETRY_BASE", parse.seconds, 2.0).doc(
        "seconds before the second attempt, doubled for each further one"
    )
    retry_cap: float = setting("RECEIVER_RETRY_CAP", parse.seconds, 3600.0).doc(
        "maximum seconds between two attempts"
    )
    breaker_failures: int | None = setting("RECEIVER_BREAKER_FAILURES", parse.limit, 20).doc(
        "failures in a row after which a handler's deliveries wait until a probe succeeds; "
        "`none`: never"
    )
    max_chain: int = setting("RECEIVER_MAX_CHAIN", parse.whole, 10).doc(
        "maximum number of predictions in a chain before one that a handler submits"
    )
    retention: Mapping[str, float] = setting(
        "RECEIVER_RETENTION_DAYS", parse.retention_days, {}, shown="none: nothing is deleted"
    ).doc(
        "days from its end until a prediction is deleted: `30`, by state "
        "`succeeded=30,failed=90,canceled=7`, or `30,dead=90`"
    )
    private_for: float = setting("RECEIVER_PRIVATE_FOR", parse.seconds, 604800.0).doc(
        "maximum seconds for which data that only handlers see (`private`) is kept"
    )
    log_format: Literal["json", "console"] | None = choice(
        "RECEIVER_LOG_FORMAT",
        ("json", "console"),
        None,
        shown="`json` unless a terminal",
    ).doc("`json` or `console`")
    log_level: Literal["debug", "info", "warning", "error"] = choice(
        "RECEIVER_LOG_LEVEL", ("debug", "info", "warning", "error"), "info"
    ).doc("`debug`, `info`, `warning` or `error`")
    allow_private_fetch: bool = setting("RECEIVER_ALLOW_PRIVATE_FETCH", parse.switch, False).doc(
        "let handlers fetch private addresses (development)"
    )
    trace_exporters: tuple[str, ...] | None = composed(
        traces.NAMES, traces.read_exporters, (), shown="none: no traces"
    ).doc(
        "[OpenTelemetry's own settings]"
        "(https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/) "
        "(extra `otel`): `otlp` over HTTP/protobuf, `console` or `none`"
    )
    """Empty: no traces, unless the embedding program set a tracer provider; None: not even then.
    The SDK reads the rest of OpenTelemetry's settings by itself."""
    proxies: Proxies = composed(proxies.NAMES, proxies.read_proxies, Proxies(), shown="none").doc(
        "proxies for outgoing requests, named in upper or lower case; SOCKS5 needs `pip "
        "install 'httpx[socks]'`. `NO_PROXY` takes hosts, domains, addresses, ranges and `*`; "
        "requests to this machine and downloads of results never use a proxy"
    )
    forward_hosts: tuple[str, ...] = setting("FORWARD_HOSTS", parse.hosts, ()).doc(
        "hosts (or `host:port`) that a submit's `reply_to` may name, by comma; `forward` sends the "
        "event there, signed with `FORWARD_SECRET`, with retries and dead letters"
    )
    metrics_folder: str | None = setting(
        "PROMETHEUS_MULTIPROC_DIR", parse.writable_folder, None
    ).doc("folder where several processes count their metrics together")
    mode: Literal["server", "serverless"] = choice(
        "RECEIVER_MODE", ("server", "serverless"), "server"
    ).doc(
        "`serverless`: work runs only in requests and drains, for platforms without a "
        "permanent process; see [Serverless](serverless.md)"
    )
    after: After = setting("RECEIVER_AFTER", parse.after, After(), shown="`drain`").doc(
        "when an event's handlers run after its callback, in serverless mode or with "
        "`--no-dispatch`: at the next `drain`; in the same request, before (`inline=2`) or "
        "after (`after=20`) its answer, for at most so many seconds; or by a request to the "
        "receiver itself (`wake`)"
    )
    cron_secrets: tuple[Secret, ...] = composed(
        ("RECEIVER_CRON_SECRET", "CRON_SECRET"), keys.cron_secrets, (), shown="none"
    ).doc("keys that are accepted for `/v1/drain` only, by comma; Vercel sends the second")
    recipes: RecipeBook = composed(
        (recipes.NAME,),
        lambda reader: recipes.read_recipes(reader, tuple(DECLARED)),
        RecipeBook(),
        shown="none",
    ).doc(
        "TOML file of [recipes](recipes.md), by which people, chats and programs order predictions"
    )
    prices: PriceList = composed(
        (prices.NAME,),
        lambda reader: prices.read_prices(reader, tuple(DECLARED)),
        PriceList(),
        shown="none",
    ).doc("TOML file of [prices](costs.md) by model; the price in a recipe takes precedence")
    limits: tuple[Limit, ...] = composed((limits.NAME,), limits.read_limits, (), shown="none").doc(
        "[limits and budgets](costs.md) for all submits, as JSON: "
        '`[{"by": "all", "per": "day", "cost": 20}]`'
    )
    costs_by: tuple[str, ...] = setting("RECEIVER_COSTS_BY", parse.names, ()).doc(
        "names of metadata by which costs are summed too, by comma, as in `team,customer`"
    )
    dashboard: bool | None = setting(
        "RECEIVER_DASHBOARD", parse.switch, None, shown="off; on with `--dev`"
    ).doc("`on`: the [dashboard](dashboard.md) at `/ui`, where people sign in with a key")
    dev: bool = setting("RECEIVER_DEV", parse.switch, False).doc(
        "same as `--dev`: generate the secrets"
    )
    providers: Mapping[str, ProviderSettings] = field(default_factory=dict)

    def adapters(self, clock: Callable[[], float] = time.time) -> dict[str, Provider]:
        """Return every provider's adapter; one without a key can still prove and read callbacks."""
        return {
            name: DECLARED[name].make(
                Given(
                    key=given.key.reveal() if given.key else "",
                    urls=given.urls,
                    admin_key=given.admin_key.reveal() if given.admin_key else "",
                    confirm=given.confirm,
                    clock=clock,
                )
            )
            for name, given in self.providers.items()
        }

    @property
    def shows_dashboard(self) -> bool:
        return self.dev if self.dashboard is None else self.dashboard

    @property
    def connections(self) -> int:
        """The most connections of a process to a PostgreSQL server."""
        return self.database_connections or USUAL_CONNECTIONS[self.mode]

    @property
    def sqlite_path(self) -> str | None:
        """The file that `database_url` names; None if it names a PostgreSQL server."""
        path = self.database_url.removeprefix("sqlite:///")
        return None if path == self.database_url else path

    def with_absolute_path(self) -> Settings:
        """Return these settings with the absolute path of the database file."""
        if self.sqlite_path is None:
            return self
        return replace(self, database_url=f"sqlite:///{Path(self.sqlite_path).absolute()}")

    @property
    def database(self) -> str:
        """The database without its user and password: the file, or the servers and the name."""
        if self.sqlite_path is not None:
            return self.sqlite_path
        parts = urlsplit(self.database_url)
        return f"postgresql://{parts.netloc.rpartition('@')[2]}{parts.path}"

    @property
    def prefix(self) -> str:
        """The path prefix that our routes may have; empty if there is none."""
        if self.root_path is not None:
            return self.root_path
        return unquote(urlsplit(self.public_url or "").path)

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Settings:
        """Read every setting from `env`; raise one SettingsError that names all problems."""
        return checked(*cls.parse(env))

    @classmethod
    def parse(cls, env: Mapping[str, str]) -> tuple[Settings, list[str]]:
        """Return what can be read, and all problems."""
        reader = Reader(env)
        values = read_rows(cls, reader)
        providers = {name: _provider(name, reader) for name in DECLARED}
        settings = cls(**values, providers=providers)
        problems = reader.problems + tls.check(env)
        if settings.after.how == "wake" and settings.public_url is None:
            problems.append("RECEIVER_AFTER: wake needs RECEIVER_PUBLIC_URL, where it calls itself")
        if settings.connections < LEAST_CONNECTIONS[settings.mode]:
            problems.append(
                f"RECEIVER_DATABASE_CONNECTIONS: must be {LEAST_CONNECTIONS[settings.mode]} or more"
            )
        if set(settings.viewer_keys) & set(settings.api_keys):
            problems.append(
                "RECEIVER_VIEWER_KEYS: must have no key of RECEIVER_API_KEYS, which may do more"
            )
        if set(settings.cron_secrets) & {*settings.api_keys, *settings.viewer_keys}:
            problems.append(
                "RECEIVER_CRON_SECRET, or CRON_SECRET, must have no key of RECEIVER_API_KEYS or "
                "RECEIVER_VIEWER_KEYS: it is good for draining alone"
            )
        is_reported = any(problem.startswith("RECEIVER_SECRET_KEY") for problem in problems)
        if not settings.secret_keys and not settings.dev and not is_reported:
            problems.append(
                "RECEIVER_SECRET_KEY is missing: set it to 32 random characters or more, for "
                "example the output of `openssl rand -hex 32` (or use --dev on your own machine)"
            )
        return settings, problems


def _provider(name: str, reader: Reader) -> ProviderSettings:
    values = {at: row.value(reader) for at, row in _rows_of(name).items()}
    urls = {part: values.pop(f"urls.{part}") for part in DECLARED[name].urls}
    return ProviderSettings(urls=urls, **values)


@dataclass(frozen=True, kw_only=True)
class Listening:
    """Where `receiver serve` listens, by the variables that platforms set."""

    port: int = setting("PORT", parse.port, 8000).doc(
        "port where `serve` listens; `--port` takes precedence"
    )
    host: str = setting(
        "HOST", parse.listening_host, "127.0.0.1", shown="`127.0.0.1`; `0.0.0.0` with `PORT`"
    ).doc("address to listen on; `--host` takes precedence")

    @classmethod
    def problems(cls, env: Mapping[str, str]) -> list[str]:
        """Return the problems of the variables, without the options of a command."""
        reader = Reader(env)
        read_rows(cls, reader)
        return reader.problems

    @classmethod
    def read(
        cls, env: Mapping[str, str], host: str | None, port: int | None, *, dev: bool = False
    ) -> Listening:
        """Return where to listen; arguments have precedence over variables.

        Raises SettingsError. With PORT set, without --dev, the default is all addresses, as the
        platform connects from another host.
        """
        reader = Reader(env)
        given: dict[str, Any] = {"host": host, "port": port}
        if reader.is_set("PORT") and not reader.is_set("HOST") and not dev:
            given["host"] = host or EVERYWHERE
        values: dict[str, Any] = {
            at: row.value(reader) if given[at] is None else given[at]
            for at, row in rows(cls).items()
        }
        problems = reader.problems
        if problems:  # report all at once, those of the other settings too
            problems += Settings.parse({**env, "RECEIVER_DEV": "1"} if dev else env)[1]
        return checked(cls(**values), problems)


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Where commands find a running receiver, and the key that they send."""

    url: str = setting("RECEIVER_URL", parse.receivers_url, "http://127.0.0.1:8000").doc(
        "URL of the receiver that commands call"
    )
    is_url_set: bool = False
    """Whether RECEIVER_URL is set."""
    key: Secret | None = composed(("RECEIVER_API_KEY",), keys.shown_key, None).doc(
        "the key that commands send"
    )
    proxy: str | None = field(default=None, repr=False)
    """None: it is reached without one."""
    way: str = ""
    """How it is reached, in a few words for errors; empty unless a proxy is set."""

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Caller:
        """Read the settings of commands; raise one SettingsError that names all problems."""
        return checked(*cls.parse(env))

    @classmethod
    def parse(cls, env: Mapping[str, str]) -> tuple[Caller, list[str]]:
        """Return what can be read, and all problems."""
        reader = Reader(env)
        values = read_rows(cls, reader)
        parts = urlsplit(values["url"])
        host = parts.hostname or ""
        spelled = map(reader.spelled, proxies.BY_SCHEME[parts.scheme])
        name = next((name for name in spelled if reader.is_set(name)), None)
        proxy, way = None, ""
        if name and is_loopback(host):  # reached directly, so no proxy is checked
            way = f", asked without {name} as it is on this machine"
        elif name and (proxy := proxies.read_proxies(reader).of(parts.scheme, host, parts.port)):
            way = f", asked by the proxy that {name} names"
        caller = cls(**values, is_url_set=reader.is_set("RECEIVER_URL"), proxy=proxy, way=way)
        return caller, reader.problems + tls.check(env)


_TLS: Final = Setting(
    tls.NAMES, None, None, "certificate authorities (CA bundle) to trust", "certifi's list"
)


def all_settings() -> list[Setting]:
    """Return every line of the table, in the order of deploy/settings.md."""
    of_providers = [row for name in DECLARED for row in _rows_of(name).values()]
    listed = (Settings, Listening, Caller)
    of_settings, of_listening, of_caller = (rows(table).values() for table in listed)
    found = [*of_settings, *of_listening, _TLS, *of_providers, *of_caller]
    order = {row.doc: place for place, row in reversed(list(enumerate(found)))}
    return sorted(found, key=lambda row: order[row.doc])
