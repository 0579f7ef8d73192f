"""Settings, read once from a mapping; every problem is reported together; secrets hide."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from receiver.model.errors import SettingsError
from receiver.model.text import clean
from receiver.settings import tls
from receiver.settings.proxies import Proxies, is_loopback, read_direct, read_proxy

T = TypeVar("T")
D = TypeVar("D")

Network = IPv4Network | IPv6Network

SHORTEST_SECRET = 32
LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1"))


class Secret:
    """A text that shows itself only when asked by name."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "Secret('**********')"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@dataclass(frozen=True, kw_only=True)
class ProviderSettings:
    """How to reach one provider, and how much of it we may use."""

    key: Secret | None = None
    """None: the provider is off for submitting; callbacks of old predictions are still taken."""
    urls: Mapping[str, str] = field(default_factory=dict)
    max_in_flight: int | None = None
    """Predictions submitted and not yet ended; None: as many as come."""
    requests_per_minute: int | None = None
    confirm: bool = False
    """Ask the provider before believing its callback."""
    allowed_sources: tuple[Network, ...] | Literal["meta"] | None = None
    """Where its callbacks may come from; `meta`: from what it publishes; None: from anywhere."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The whole configuration; `Settings.read(os.environ)` makes one."""

    secret_keys: tuple[Secret, ...] = ()
    """Newest first. Empty only in development, where the app makes one up and keeps it."""
    api_keys: tuple[Secret, ...] = ()
    public_url: str | None = None
    database_url: str = field(default="sqlite:///receiver.db", repr=False)
    """`sqlite:///file`, or `postgresql://…`, which may hold a password: show `database`."""
    handlers: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 1024 * 1024
    limit_unproved_per_minute: int | None = 600
    """Requests that come to nothing, of one address (IPv6: /64) and of one callback URL."""
    limit_callbacks_per_minute: int | None = None
    """Proved callbacks of one provider, in this process."""
    limit_api_per_minute: int | None = None
    """/v1 requests with a good key, of one address."""
    trusted_proxies: tuple[Network, ...] = LOOPBACK
    """Whose word of the caller's address is believed."""
    poll_after: float | None = None
    """Seconds to the first poll; None: 30 where a push is expected, 3 where it is not."""
    prediction_timeout: float = 3600.0
    retry_attempts: int = 10
    retry_base: float = 2.0
    retry_cap: float = 3600.0
    breaker_failures: int | None = 20
    """Failures in a row after which a handler's deliveries wait; None: never."""
    max_chain: int = 10
    """Predictions that may lead, each by a handler, to one that a handler submits."""
    retention: Mapping[str, float] = field(default_factory=dict)
    """Days for which what ended `succeeded`, `failed` or `canceled` is kept, and deliveries that
    are `dead`; what is not named is kept for good."""
    log_format: Literal["json", "console"] | None = None
    """None: console on a terminal, JSON elsewhere."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    trace_exporters: tuple[str, ...] | None = ()
    """Where OpenTelemetry's settings want traces to go; the SDK reads the rest of them by itself.

    Empty: nowhere, unless the embedding program has set a tracer provider; None: not even then.
    """
    allow_private_fetch: bool = False
    dev: bool = False
    proxies: Proxies = field(default_factory=Proxies)
    """Which of our own requests go by a proxy, as HTTPS_PROXY and its like say."""
    forward_hosts: tuple[str, ...] = ()
    """Hosts that a submit's `reply_to` may name, as `host` or `host:port`."""
    metrics_folder: str | None = None
    """Where processes count together; prometheus-client reads it by itself."""
    providers: Mapping[str, ProviderSettings] = field(default_factory=dict)

    @property
    def sqlite_path(self) -> str | None:
        """The file that `database_url` names; None where it names a PostgreSQL server."""
        path = self.database_url.removeprefix("sqlite:///")
        return None if path == self.database_url else path

    @property
    def database(self) -> str:
        """The database without what is secret about it: the file, or the servers and the name."""
        if self.sqlite_path is not None:
            return self.sqlite_path
        parts = urlsplit(self.database_url)
        return f"postgresql://{parts.netloc.rpartition('@')[2]}{parts.path}"

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Settings:
        """Read every setting from `env`; raise one SettingsError that names all problems."""
        settings, problems, _ = cls.look(env)
        if problems:
            raise SettingsError(problems)
        return settings

    @classmethod
    def look(cls, env: Mapping[str, str]) -> tuple[Settings, list[str], set[str]]:
        """Read what can be read; tell also all problems, and the names that there are."""
        reader = Reader(env)
        settings = _read(reader)
        reader.problems += tls.check(env)
        told = any(problem.startswith("RECEIVER_SECRET_KEY") for problem in reader.problems)
        if not settings.secret_keys and not settings.dev and not told:
            reader.problems.append(
                "RECEIVER_SECRET_KEY is missing: set it to 32 random characters or more, for "
                "example the output of `openssl rand -hex 32` (or use --dev on your own machine)"
            )
        return settings, reader.problems, reader.names


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Where commands find a receiver that runs, and the key that they show there."""

    url: str = "http://127.0.0.1:8000"
    is_told: bool = False
    """Whether RECEIVER_URL says so."""
    key: Secret | None = None
    proxy: str | None = field(default=None, repr=False)
    """None: it is asked without one."""
    way: str = ""
    """How it is asked, where a proxy is set: a few words for an error."""

    @classmethod
    def read(cls, env: Mapping[str, str]) -> Caller:
        """Read what commands need; raise one SettingsError that names all problems."""
        caller, problems = cls.look(env)
        if problems:
            raise SettingsError(problems)
        return caller

    @classmethod
    def look(cls, env: Mapping[str, str]) -> tuple[Caller, list[str]]:
        """Read what can be read; tell also all problems."""
        reader = Reader(env)
        key = reader.get("RECEIVER_API_KEY", _one_key, None)
        url = reader.get("RECEIVER_URL", _receivers_url, None)
        parts = urlsplit(url or cls.url)
        host, spelled = parts.hostname or "", map(reader.spelled, _PROXIES[parts.scheme])
        name = next((name for name in spelled if reader.is_set(name)), None)
        proxy, way = None, ""
        if name and is_loopback(host):  # asked straight, so no proxy can be wrong
            way = f", asked without {name} as it is on this machine"
        elif name and (proxy := _ways_out(reader).of(parts.scheme, host, parts.port)):
            way = f", asked by the proxy that {name} names"
        made = cls(url=url or cls.url, is_told=bool(url), key=key, proxy=proxy, way=way)
        return made, reader.problems + tls.check(env)


class Reader:
    """Take values out of a mapping and collect what is wrong with them."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        self.problems: list[str] = []
        self.names: set[str] = set()
        """Every name that was asked for."""

    def get(
        self,
        name: str,
        parse: Callable[[str], T],
        default: D,
        *,
        as_text: str | None = "",
        says: str = "",
        at: str = "",
    ) -> T | D:
        """Return what a value means; `default` where it is not set or wrong.

        `as_text`: a default that is parsed too; None: there must be a value. `says` and `at` go
        into problems of handlers' settings: what it is, and where it is read.
        """
        self.names.add(name)
        given = self._env.get(name, "").strip()
        text = clean(given) or as_text
        if text is None:
            self._refuse(f"{at}needs {name} as {says}")
            return default
        if not text and not at:
            return default
        try:
            text.encode()
            return _parsed(parse, text, given)
        except UnicodeEncodeError:
            problem = "must be UTF-8"
        except ValueError as error:
            problem = str(error)
        self._refuse(f"{at}{name}{' ' if at else ': '}{problem}")
        return default

    def is_set(self, name: str) -> bool:
        return bool(clean(self._env.get(name, "")))

    def spelled(self, name: str) -> str:
        """Return the name in lower case if it is set so, which goes before the other."""
        return name.lower() if name.lower() in self._env else name

    def _refuse(self, problem: str) -> None:
        if problem not in self.problems:  # a name may be asked for twice
            self.problems.append(problem)


def _parsed(parse: Callable[[str], T], text: str, given: str) -> T:
    """Parse a text; with the quotes that were around it where it makes sense only with them."""
    try:
        return parse(text)
    except ValueError:
        if given not in {text, ""}:
            with contextlib.suppress(ValueError):
                return parse(given)
        raise


def _read(env: Reader) -> Settings:
    return Settings(
        secret_keys=env.get("RECEIVER_SECRET_KEY", _strong_secrets, ()),
        api_keys=env.get("RECEIVER_API_KEYS", _secrets, ()),
        public_url=env.get("RECEIVER_PUBLIC_URL", _url, None),
        database_url=env.get("RECEIVER_DATABASE_URL", _database_url, "sqlite:///receiver.db"),
        handlers=env.get("RECEIVER_HANDLERS", _texts, ()),
        max_body_bytes=env.get("RECEIVER_MAX_BODY_BYTES", _whole, 4 * 1024 * 1024),
        limit_unproved_per_minute=env.get("RECEIVER_LIMIT_UNPROVED_PER_MINUTE", _limit, 600),
        limit_callbacks_per_minute=env.get("RECEIVER_LIMIT_CALLBACKS_PER_MINUTE", _limit, None),
        limit_api_per_minute=env.get("RECEIVER_LIMIT_API_PER_MINUTE", _limit, None),
        trusted_proxies=env.get("RECEIVER_TRUSTED_PROXIES", _proxies, LOOPBACK),
        poll_after=env.get("RECEIVER_POLL_AFTER", seconds, None),
        prediction_timeout=env.get("RECEIVER_PREDICTION_TIMEOUT", seconds, 3600.0),
        retry_attempts=env.get("RECEIVER_RETRY_ATTEMPTS", _whole, 10),
        retry_base=env.get("RECEIVER_RETRY_BASE", seconds, 2.0),
        retry_cap=env.get("RECEIVER_RETRY_CAP", seconds, 3600.0),
        breaker_failures=env.get("RECEIVER_BREAKER_FAILURES", _limit, 20),
        max_chain=env.get("RECEIVER_MAX_CHAIN", _whole, 10),
        retention=env.get("RECEIVER_RETENTION_DAYS", _days, {}),
        log_format=env.get("RECEIVER_LOG_FORMAT", _one_of("json", "console"), None),
        log_level=env.get(
            "RECEIVER_LOG_LEVEL", _one_of("debug", "info", "warning", "error"), "info"
        ),
        trace_exporters=_trace_exporters(env),
        allow_private_fetch=env.get("RECEIVER_ALLOW_PRIVATE_FETCH", _switch, False),
        dev=env.get("RECEIVER_DEV", _switch, False),
        proxies=_ways_out(env),
        forward_hosts=env.get("FORWARD_HOSTS", _hosts, ()),
        metrics_folder=env.get("PROMETHEUS_MULTIPROC_DIR", _writable_folder, None),
        providers={
            "oxen": _provider(env, "OXEN", "OXEN_API_KEY", base="https://hub.oxen.ai"),
            "eachlabs": _provider(
                env,
                "EACHLABS",
                "EACHLABS_API_KEY",
                in_flight=10,
                per_minute=100,
                base="https://api.eachlabs.ai",
            ),
            "fal": _provider(
                env,
                "FAL",
                "FAL_KEY",
                queue="https://queue.fal.run",
                run="https://fal.run",
                jwks="https://rest.fal.ai/.well-known/jwks.json",
                meta="https://api.fal.ai/v1/meta",
            ),
        },
    )


_URL_NAMES = {
    "base": "BASE_URL",
    "queue": "QUEUE_URL",
    "run": "RUN_URL",
    "jwks": "JWKS_URL",
    "meta": "META_URL",
}


def _provider(
    env: Reader,
    prefix: str,
    key_name: str,
    *,
    in_flight: int | None = None,
    per_minute: int | None = None,
    **urls: str,
) -> ProviderSettings:
    return ProviderSettings(
        key=env.get(key_name, _header_safe, None),
        urls={
            name: env.get(f"{prefix}_{_URL_NAMES[name]}", _url, default)
            for name, default in urls.items()
        },
        max_in_flight=env.get(f"{prefix}_MAX_IN_FLIGHT", _limit, in_flight),
        requests_per_minute=env.get(f"{prefix}_REQUESTS_PER_MINUTE", _limit, per_minute),
        confirm=env.get(f"{prefix}_CONFIRM", _switch, False),
        allowed_sources=env.get(
            f"{prefix}_ALLOWED_SOURCES", _sources if "meta" in urls else _networks, None
        ),
    )


_PROXIES = {scheme: (f"{scheme.upper()}_PROXY", "ALL_PROXY") for scheme in ("http", "https")}
"""Where the proxy for a request is named; the first that is set counts."""


def _ways_out(env: Reader) -> Proxies:
    """Read what curl, httpx and others read; of what is not needed nothing can be wrong."""
    found = {}
    for scheme, names in _PROXIES.items():
        for name in map(env.spelled, names):
            if url := env.get(name, read_proxy, None):
                found[scheme] = url
            if env.is_set(name):
                break
    direct = env.get(env.spelled("NO_PROXY"), read_direct, ()) if found else ()
    return Proxies(found, direct)


_OTLP = {"": "otlp_proto_http", "http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


def _trace_exporters(env: Reader) -> tuple[str, ...] | None:
    """Read what OpenTelemetry has a standard for, but for its protocol where none is named."""
    if env.get("OTEL_SDK_DISABLED", str.lower, "") == "true":
        return None
    spoken = env.get("OTEL_EXPORTER_OTLP_PROTOCOL", str, "")
    spoken = env.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", str, spoken)
    places = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    # gRPC may do with a host and a port.
    asked = [env.get(name, str if spoken == "grpc" else _collector, "") for name in places]
    names = env.get("OTEL_TRACES_EXPORTER", _texts, ("otlp",) if any(asked) else ())
    otlp = _OTLP.get(spoken, spoken)
    return tuple(otlp if name == "otlp" else name for name in names if name != "none")


def _texts(text: str) -> tuple[str, ...]:
    return tuple(part for part in map(clean, text.split(",")) if part)


def _hosts(text: str) -> tuple[str, ...]:
    hosts = tuple(part.lower() for part in _texts(text))
    if not hosts or not all(map(_is_host, hosts)):
        raise ValueError("must be hosts by comma, as in bot.example or bot.example:8443")
    return hosts


def _is_host(text: str) -> bool:
    try:
        parts = urlsplit(f"//{text}")
        sendable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return sendable and parts.netloc == text and not re.search(r"[^!-~]|[@*\\]", text)


def _secrets(text: str) -> tuple[Secret, ...]:
    return tuple(Secret(part) for part in _texts(text))


def _strong_secrets(text: str) -> tuple[Secret, ...]:
    if any(len(part) < SHORTEST_SECRET for part in _texts(text)):
        raise ValueError(f"every key must have {SHORTEST_SECRET} characters or more")
    return _secrets(text)


def _header_safe(text: str) -> Secret | None:
    if not text.isascii() or not text.isprintable():
        raise ValueError("must be printable ASCII, as it travels in a header")
    return Secret(text)


def _one_key(text: str) -> Secret | None:
    if "," in text:
        raise ValueError("must be one key; those that the receiver takes are in RECEIVER_API_KEYS")
    return _header_safe(text)


def _collector(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise ValueError("must be an http(s) URL, as http://collector:4318")
    return text


def _url(text: str) -> str:
    if "://" not in text:
        raise ValueError("must begin with https:// or http://")
    if not _is_plain_url(text):
        raise ValueError("must be an http(s) URL without user, query or fragment")
    return text.rstrip("/")


def _receivers_url(text: str) -> str:
    """Read a URL; on this machine its scheme may be left out, as nobody listens on the way."""
    try:
        host = urlsplit(f"//{text}").hostname or ""
    except ValueError:
        host = ""
    return _url(f"http://{text}" if "://" not in text and is_loopback(host) else text)


def _is_plain_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        sendable = bool(parts.hostname) and parts.port != 0 and text.isprintable()
    except ValueError:
        return False
    more = parts.username or parts.password or parts.query or parts.fragment or " " in text
    return parts.scheme in {"http", "https"} and sendable and not more


def _database_url(text: str) -> str:
    if text.startswith(("postgresql://", "postgres://")):
        return _postgres_url(text)
    path = text.removeprefix("sqlite:///")
    if path == text or not path or path.endswith("/") or path == ":memory:":
        raise ValueError(
            "must be sqlite:///path of a file (four slashes for an absolute path), or "
            "postgresql://user@host/name"
        )
    return text


def _postgres_url(text: str) -> str:
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - reading it is the check
    except ValueError:
        # What is wrong may be the password, so it is not said.
        raise ValueError(
            "is no URL: percent-encode what is odd in the password (an @ as %40, a / as %2F)"
        ) from None
    return text


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("must be a whole number, 1 or more")
    return int(text)


def _limit(text: str) -> int | None:
    return None if text.lower() == "none" else _whole(text)


def _networks(text: str) -> tuple[Network, ...]:
    try:
        networks = tuple(map(ip_network, _texts(text)))
    except ValueError as error:
        raise ValueError(f"must be addresses and ranges like 203.0.113.0/24: {error}") from None
    if not networks:
        raise ValueError("must be an address or a range like 203.0.113.0/24")
    return networks


def _proxies(text: str) -> tuple[Network, ...]:
    return () if text.lower() == "none" else _networks(text)


def _sources(text: str) -> tuple[Network, ...] | Literal["meta"]:
    return "meta" if text.lower() == "meta" else _networks(text)


def seconds(text: str) -> float:
    """Read a number of seconds above 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 < number < 1e9:  # noqa: PLR2004 - thirty years; also refuses nan and inf
        raise ValueError("must be a number of seconds above 0")
    return number


_ENDS = ("succeeded", "failed", "canceled")
_MOST_DAYS = 36525.0


def _days(text: str) -> dict[str, float]:
    """Read `30`, `failed=90,canceled=0.5`, or both: a number without a name is for every end."""
    days: dict[str, float] = {}
    for part in _texts(text):
        name, equals, number = part.rpartition("=")
        name = name.strip().lower()
        if equals and name not in {*_ENDS, "dead"}:
            raise ValueError(f"must name {', '.join(_ENDS)} or dead, as in 30,failed=90")
        days |= dict.fromkeys([name] if equals else _ENDS, _day(number))
    return days


def _day(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 < number <= _MOST_DAYS:  # also refuses nan
        raise ValueError("must be days above 0, as in 30 or succeeded=30,failed=90,canceled=7")
    return number


_SWITCHES = {"1": True, "true": True, "yes": True, "on": True}
_SWITCHES |= {"0": False, "false": False, "no": False, "off": False}


def _switch(text: str) -> bool:
    try:
        return _SWITCHES[text.lower()]
    except KeyError:
        raise ValueError("must be 1 or 0") from None


def _writable_folder(text: str) -> str:
    folder = Path(text)
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{text} is no folder that can be written, and cannot be made one")
    return text


def _one_of(*words: str) -> Callable[[str], Any]:
    def parse(text: str) -> str:
        if text.lower() not in words:
            near = difflib.get_close_matches(text.lower(), words, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"must be one of {', '.join(words)}{meant}")
        return text.lower()

    return parse
