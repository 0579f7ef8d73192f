"""PostgreSQL URLs: as hosting services give them, translated for asyncpg.

asyncpg would send a parameter that only libpq or another driver knows to the server as a setting,
and the server would refuse it.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias, get_args
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from receiver.model.errors import StoreUnusable
from receiver.settings.servers import MisnamedServers, Servers, servers

_Use: TypeAlias = Literal["driver", "startup", "file", "dropped"]

_USES: Final[Mapping[str, _Use]] = {
    # asyncpg reads them from a URL.
    **dict.fromkeys(
        (
            *("user", "password", "dbname", "database", "passfile", "service"),
            *("sslmode", "sslnegotiation", "sslpassword", "target_session_attrs"),
            *("ssl_min_protocol_version", "ssl_max_protocol_version", "krbsrvname", "gsslib"),
        ),
        "driver",
    ),
    **dict.fromkeys(("sslcert", "sslkey", "sslrootcert", "sslcrl"), "file"),
    # The server, or a proxy in front of it, needs them in the start-up message.
    **dict.fromkeys(("options", "application_name"), "startup"),
    # libpq's, for which asyncpg has another way or none.
    **dict.fromkeys(
        (
            *("channel_binding", "keepalives", "keepalives_idle", "keepalives_interval"),
            *("keepalives_count", "tcp_user_timeout", "gssencmode", "gssdelegation"),
            *("load_balance_hosts", "client_encoding", "fallback_application_name"),
            *("hostaddr", "sslcompression", "sslcertmode", "sslsni", "sslcrldir", "requirepeer"),
            *("require_auth", "requiressl", "min_protocol_version", "max_protocol_version"),
        ),
        "dropped",
    ),
    # Those of other drivers and of hosting services.
    **dict.fromkeys(
        (
            *("pgbouncer", "schema", "connection_limit", "pool_timeout", "socket_timeout"),
            *("statement_cache_size", "prepared_statement_cache_size", "prepare", "sslaccept"),
            *("sslidentity", "prepareThreshold", "currentSchema", "supa", "workaround"),
            *("uselibpqcompat", "max_idle_connection_lifetime", "single_use_connections"),
        ),
        "dropped",
    ),
}
_MUST_HOLD: Final = {("gssencmode", "require"): "sslmode=verify-full"}
"""Parameters that require a protection which we cannot give, and the one that gives it."""
_ENCODE: Final = (
    "percent-encode special characters in the user and the password: @ as %40, / as %2F, "
    "# as %23, ? as %3F, % as %25"
)
_FLAG: Final = re.compile(r"(?:-c\s*|--)([A-Za-z_.]+)=((?:\\.|[^\s\\])*)")
_ESCAPED: Final = re.compile(r"\\(.)")
_SETTING: Final = re.compile(r"[A-Za-z_]+(\.[A-Za-z_]+)?")


class Address(NamedTuple):
    """The address of a database, and how to connect to it."""

    dsn: str
    """The URL for asyncpg."""
    place: str
    """The hosts and the name of the database; nothing secret."""
    timeout: float | None
    """Seconds that connecting may take; None: our default."""
    startup: dict[str, str]
    settings: dict[str, str]
    """Settings for the server, which refuses unknown ones."""
    dropped: tuple[str, ...]
    """Parameters that have no effect here."""
    context: ssl.SSLContext | None
    is_pooled: bool
    """Whether the URL is recognizably that of a pooler in transaction mode."""


def read(url: str) -> Address:
    """Return the address of a URL, or raise StoreUnusable with the fault, never the password."""
    try:
        return _read(url)
    except MisnamedServers as error:
        raise _unusable(str(error)) from error
    except ValueError as error:
        # The invalid part may be the password, so the message leaves it out.
        raise StoreUnusable(
            "cannot open the database: RECEIVER_DATABASE_URL is not a PostgreSQL URL; write "
            f"postgresql://user:password@host:port/name, and {_ENCODE}"
        ) from error


def _read(url: str) -> Address:
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    named = servers(url)
    if parts.fragment or "@" in parts.path or "@" in user or (not at and "@" in parts.query):
        raise ValueError
    given = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    place = f"{given.pop('host', '') or hosts or 'the local socket'}{parts.path}"
    given.pop("port", None)
    timeout = _seconds(given.pop("connect_timeout", ""))
    is_pooled = given.get("pgbouncer") == "true" or _is_poolers(named)
    by_use = _by_use(given)
    rest, flags = _flags(by_use["startup"].pop("options", ""))
    if rest:
        by_use["startup"]["options"] = rest
    context = _context(by_use["file"], by_use["driver"])
    for name, path in by_use["file"].items():
        if not Path(path).is_file():
            raise _unusable(f"{name} names {path}, which is not a file that can be read")
        if name == "sslrootcert":
            _check_authorities(path)
    # asyncpg would prefer servers in front of the path, and split their socket folders at colons.
    at_servers = {"host": ",".join(named.hosts), "port": ",".join(named.ports)}
    where = {name: text for name, text in at_servers.items() if text}
    query = urlencode({**where, **by_use["driver"], **by_use["file"]})
    # asyncpg would take an empty database name as "".
    path = parts.path if unquote(parts.path).strip("/") else ""
    dsn = parts._replace(netloc=user + at, query=query, fragment="", path=path).geturl()
    if "://" not in dsn:  # geturl leaves out an empty authority
        dsn = dsn.replace(":", "://", 1)
    return Address(
        dsn,
        place,
        timeout,
        {"application_name": "receiver", **by_use["startup"]},
        {**flags, **by_use["setting"]},
        tuple(by_use["dropped"]),
        context,
        is_pooled,
    )


def _is_poolers(named: Servers) -> bool:
    """Return whether a host or port is one that Neon or Supabase gives its poolers."""
    return "6543" in named.ports or any("-pooler." in host for host in named.hosts)


def _flags(options: str) -> tuple[str, dict[str, str]]:
    """Separate the settings in libpq's `options` from the rest: poolers refuse them there."""
    found = {name: _ESCAPED.sub(r"\1", value) for name, value in _FLAG.findall(options)}
    return _FLAG.sub("", options).strip(), found


def _by_use(given: dict[str, str]) -> dict[str, dict[str, str]]:
    """Sort parameters by use; an unknown one may be a setting of the server."""
    if given.pop("ssl", "") in {"true", "1", "require"}:
        given.setdefault("sslmode", "require")
    found: dict[str, dict[str, str]] = {use: {} for use in (*get_args(_Use), "setting")}
    for name, value in given.items():
        if needed := _MUST_HOLD.get((name, value)):
            raise _unusable(f"{name}={value} cannot be kept here; use {needed}")
        if name not in _USES and not _SETTING.fullmatch(name):
            raise ValueError
        if name not in _USES and "@" in value:  # it may be the rest of a password
            raise ValueError
        found[_USES.get(name, "setting")][name] = value
    return found


def _seconds(text: str) -> float | None:
    """Return libpq's connect_timeout; None if it has no limit: it is empty, zero or negative."""
    try:
        seconds = float(text or 0)
    except ValueError:
        raise _unusable("connect_timeout must be a number of seconds") from None
    return seconds if seconds > 0 else None


def _context(files: dict[str, str], driver: Mapping[str, str]) -> ssl.SSLContext | None:
    """Return a context for `sslrootcert=system`, which asyncpg would take for a file; or None."""
    if files.get("sslrootcert") != "system":
        return None
    if driver.get("sslmode", "verify-full") != "verify-full":
        raise _unusable("sslrootcert=system needs sslmode=verify-full")
    del files["sslrootcert"]
    context = ssl.create_default_context()
    if "sslcert" in files:
        context.load_cert_chain(files["sslcert"], files.get("sslkey"))
    return context


def _check_authorities(path: str) -> None:
    """Raise StoreUnusable with the file and the parameter, which OpenSSL's error does not name."""
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:  # SSLError too
        why = f": {error.strerror}" if error.strerror else ""
        raise _unusable(f"sslrootcert names {path}, which holds no certificates{why}") from error


def _unusable(what: str) -> StoreUnusable:
    return StoreUnusable(f"cannot open the database: RECEIVER_DATABASE_URL: {what}")


def set_config(settings: Mapping[str, str], *, is_local: bool) -> str:
    """Return the statement that sets these until the end of the transaction, or of the session."""
    until = "true" if is_local else "false"
    calls = (f"set_config('{name}', {_quoted(value)}, {until})" for name, value in settings.items())
    return f"SELECT {', '.join(calls)}"


def _quoted(text: str) -> str:
    doubled = text.replace("'", "''")
    return f"'{doubled}'"


def _causes(place: str, seconds: float) -> Mapping[str, str]:
    """Return the meanings of connection errors, by the name of a class of the error."""
    return {
        "SSLCertVerificationError": f"the certificate of {place} is not trusted; name its authority"
        " by sslrootcert=FILE, or sslrootcert=system for those of this machine",
        "gaierror": f"the name of the host in {place} is not known; check it, and {_ENCODE}",
        "ConnectionRefusedError": f"{place} refuses connections",
        "TimeoutError": f"{place} did not answer within {seconds:g} s",
        "InvalidPasswordError": f"{place} does not accept the password; check it, and {_ENCODE}",
        "InvalidAuthorizationSpecificationError": f"{place} does not let this user in",
        "InvalidCatalogNameError": f"{place} has no such database",
        "UndefinedObjectError": f"RECEIVER_DATABASE_URL has a parameter that neither we nor {place}"
        " know",
        "InvalidParameterValueError": "RECEIVER_DATABASE_URL has a parameter with a value that "
        f"{place} does not take",
        "TooManyConnectionsError": f"{place} has no connection left",
        **dict.fromkeys(
            ("ValueError", "SSLError", "FileNotFoundError", "PermissionError"),
            f"{place}, by {', '.join(['RECEIVER_DATABASE_URL', *_libpqs()])}",
        ),
    }


def explain(error: BaseException, place: str, seconds: float) -> str:
    """Return a short reason why no connection could be made."""
    known = _causes(place, seconds)
    kinds = [kind.__name__ for kind in type(error).__mro__]
    said = next((known[kind] for kind in kinds if kind in known), place)
    words = "; ".join(str(error).splitlines())
    return f"{said} ({type(error).__name__}: {words})"


def _libpqs() -> list[str]:
    """Return the libpq variables that are set: asyncpg uses them for what a URL leaves out."""
    return sorted(filter(re.compile(r"PG[A-Z]+").fullmatch, os.environ))
