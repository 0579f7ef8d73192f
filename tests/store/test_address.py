"""PostgreSQL URLs as hosting services give them: parameters, poolers, servers and errors."""

from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import pytest
from asyncpg import connect_utils

from receiver.model.errors import SettingsError, StoreUnusable
from receiver.settings import Settings
from receiver.settings.servers import servers
from receiver.store.inbox import accept_outcome
from receiver.store.postgres.address import read
from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.queue import PgQueuerJobs
from tests.loopback import free_port
from tests.postgres import Database
from tests.store.parts import arrival, new, settlement, wanted

AT = "postgresql://me:hush@db.example/app"

TAKEN = {
    f"{AT}?sslmode=require&channel_binding=require": ("channel_binding",),
    f"{AT}?keepalives=1&keepalives_idle=5&tcp_user_timeout=9": (
        *("keepalives", "keepalives_idle", "tcp_user_timeout"),
    ),
    f"{AT}?pgbouncer=true&schema=public&connection_limit=1&pool_timeout=0": (
        *("pgbouncer", "schema", "connection_limit", "pool_timeout"),
    ),
    f"{AT}?gssencmode=disable&load_balance_hosts=random&client_encoding=UTF8": (
        *("gssencmode", "load_balance_hosts", "client_encoding"),
    ),
    f"{AT}?sslmode=require&supa=base-pooler.x": ("supa",),
    "postgres://me:hu%2Fsh@one:1,two:2/app?target_session_attrs=read-write": (),
    "postgresql://me@[fd00::1]:5433/app": (),
    "postgresql:///app?host=/run/postgresql&user=a%40b": (),
    "postgresql://me:@db.example": (),
}


@pytest.mark.parametrize("url", TAKEN)
def test_url_is_accepted_without_the_parameters_of_other_drivers(url: str) -> None:
    found = read(url)
    assert found.dropped == TAKEN[url]
    assert not any(name in found.dsn for name in found.dropped)
    assert found.settings == {}
    assert "hu" not in found.place


def test_options_and_application_name_are_startup_parameters() -> None:
    found = read(f"{AT}?options=endpoint%3Dep-1&application_name=mine&statement_timeout=5000")
    assert found.startup == {"options": "endpoint=ep-1", "application_name": "mine"}
    assert found.settings == {"statement_timeout": "5000"}


@pytest.mark.parametrize(
    ("url", "is_pooled"),
    [
        ("me:x@ep-a-1-pooler.eu-central-1.aws.neon.tech/db?sslmode=require&channel_binding=require",
         True),
        ("me:x@ep-a-1.eu-central-1.aws.neon.tech/db?sslmode=require&channel_binding=require",
         False),
        ("postgres.ref:x@aws-0-eu-central-1.pooler.supabase.com:6543/postgres", True),
        ("postgres.ref:x@aws-0-eu-central-1.pooler.supabase.com:6543/postgres?pgbouncer=true",
         True),
        ("postgres.ref:x@aws-0-eu-central-1.pooler.supabase.com:5432/postgres", False),
        ("me:x@db.example/db?pgbouncer=true", True),
    ],
)  # fmt: skip
def test_pooler_is_recognized_by_host_port_or_pgbouncer_parameter(
    url: str, *, is_pooled: bool
) -> None:
    assert read(f"postgresql://{url}").is_pooled is is_pooled


@pytest.mark.parametrize(
    ("options", "rest", "settings"),
    [
        ("-c search_path=a,b", "", {"search_path": "a,b"}),
        (r"-cwork_mem=5MB --geqo=off -c my.app=a\ b\\", "",
         {"work_mem": "5MB", "geqo": "off", "my.app": "a b\\"}),
        ("endpoint=ep-1 -c jit=on", "endpoint=ep-1", {"jit": "on"}),
        ("reference=abc", "reference=abc", {}),
    ],
)  # fmt: skip
def test_settings_in_options_are_separated_because_poolers_reject_them(
    options: str, rest: str, settings: dict[str, str]
) -> None:
    found = read(f"{AT}?options={quote(options)}")
    assert found.startup.get("options", "") == rest
    assert found.settings == settings


@pytest.mark.parametrize(("text", "seconds"), [("10", 10.0), ("0", None), ("", None)])
def test_connect_timeout_is_read_from_the_url(text: str, seconds: float | None) -> None:
    assert read(f"{AT}?connect_timeout={text}").timeout == seconds


def test_sslrootcert_system_uses_the_system_certificates() -> None:
    found = read(f"{AT}?sslmode=verify-full&sslrootcert=system")
    assert found.context is not None
    assert found.context.check_hostname
    assert "sslrootcert" not in found.dsn


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("gssencmode=require", "gssencmode=require cannot be kept"),
        ("sslmode=require&sslrootcert=system", "needs sslmode=verify-full"),
        ("sslrootcert=/nowhere.pem", "names /nowhere.pem"),
        ("sslcert=/nowhere.crt", "names /nowhere.crt"),
        ("connect_timeout=soon", "connect_timeout must be a number of seconds"),
    ],
)
def test_invalid_parameter_is_rejected_with_its_name(more: str, words: str) -> None:
    with pytest.raises(StoreUnusable, match="RECEIVER_DATABASE_URL") as refused:
        read(f"{AT}?{more}")
    assert words in str(refused.value)


def test_sslrootcert_file_without_certificates_is_rejected_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "root.crt"
    path.write_text("no certificate")
    with pytest.raises(StoreUnusable, match=f"sslrootcert names {path}, which holds no certif"):
        read(f"{AT}?sslmode=verify-full&sslrootcert={path}")


@pytest.mark.parametrize("password", ["hu@sh", "hu/sh", "hu#sh", "hu?sh", "hu[sh", "hu@/sh"])
def test_password_not_percent_encoded_is_rejected_without_showing_it(password: str) -> None:
    with pytest.raises(StoreUnusable, match="percent-encode") as refused:
        read(f"postgresql://me:{password}@db.example/app")
    assert "hu" not in str(refused.value)
    assert "sh" not in str(refused.value)


@pytest.mark.parametrize("url", ["postgresql://me:hush/app", "postgresql://me:hush@h:hush/app"])
def test_invalid_port_is_rejected_without_showing_it(url: str) -> None:
    with pytest.raises(StoreUnusable) as refused:
        read(url)
    assert "hush" not in str(refused.value)


SERVERS = {
    "me:hu%2Fsh@one:1,two:2/app?target_session_attrs=read-write": [("one", 1), ("two", 2)],
    "one,two:2/app": [("one", 5432), ("two", 2)],
    "one:1,two/app": [("one", 1), ("two", 5432)],
    "/app?host=one,two&port=1,2": [("one", 1), ("two", 2)],
    "/app?host=one,two&port=1": [("one", 1), ("two", 1)],
    "/app?host=one,two&port=,2": [("one", 5432), ("two", 2)],
    "one:1,two:2/app?port=3": [("one", 3), ("two", 3)],
    "me@[fd00::1]:1,[fd00::2],three:3/app": [("fd00::1", 1), ("fd00::2", 5432), ("three", 3)],
    "/app?host=fd00::1,[fd00::2],three&port=1,2,3": [("fd00::1", 1), ("fd00::2", 2), ("three", 3)],
    "/app?host=fe80::1%25eth0": [("fe80::1%eth0", 5432)],
    "%2Frun%2Fpg:1,two:2/app": ["/run/pg/.s.PGSQL.1", ("two", 2)],
    "me@%2Fa%2Fb%3Ac%3Ad/app": ["/a/b:c:d/.s.PGSQL.5432"],
    "me:x@localhost/app?host=/a/b:c:d": ["/a/b:c:d/.s.PGSQL.5432"],
    "me:x@localhost:7/app?host=/a,/b": ["/a/.s.PGSQL.7", "/b/.s.PGSQL.7"],
}


@pytest.mark.parametrize("rest", SERVERS)
def test_asyncpg_gets_all_hosts_and_ports_of_a_url_in_order(
    rest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGPORT", raising=False)
    url = f"postgresql://{rest}"
    Settings.read({"RECEIVER_DEV": "1", "RECEIVER_DATABASE_URL": url})
    names = ("host", "port", "user", "password", "passfile", "database", "ssl", "service")
    more = ("servicefile", "direct_tls", "server_settings", "target_session_attrs")
    nothing = dict.fromkeys((*names, *more, "krbsrvname", "gsslib"))
    parse = vars(connect_utils)["_parse_connect_dsn_and_args"]
    assert parse(dsn=read(url).dsn, **nothing)[0] == SERVERS[rest]


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        ("me:hush@one:1,two:2/app?port=1,2,3", "names 3 ports for 2 hosts"),
        ("me:hush@one,,two/app", "has a comma without a host before and after it"),
        ("me:hush@one,/app", "has a comma without a host before and after it"),
        ("/app?host=one,&password=hush", "has a comma without a host before and after it"),
        ("me:hush@one:1,two:70000/app", "has a port that is not a number"),
        ("me:hush@one:0/app", "has a port that is not a number"),
        ("me:hush@one/app?port=five", "has a port that is not a number"),
        ("me:hush@one,two:hush/app", "percent-encode"),
        ("me:hush,x/app", "percent-encode"),
    ],
)
def test_invalid_hosts_or_ports_are_rejected_by_settings_and_store(rest: str, words: str) -> None:
    url = f"postgresql://{rest}"
    with pytest.raises(SettingsError) as at_start:
        Settings.read({"RECEIVER_DEV": "1", "RECEIVER_DATABASE_URL": url})
    with pytest.raises(StoreUnusable) as at_opening:
        read(url)
    for said in (str(at_start.value), str(at_opening.value)):
        assert words in said
        assert "RECEIVER_DATABASE_URL" in said
        assert "hush" not in said


@pytest.mark.anyio
@pytest.mark.parametrize("in_front", [True, False])
async def test_unreachable_first_server_is_skipped(database: Database, *, in_front: bool) -> None:
    """The store and PgQueuer's own connections both use the second of two servers."""
    there, parts = servers(database.url), urlsplit(database.url)
    host, port = there.hosts[0], there.ports[0] if there.ports else "5432"
    dead = free_port()
    user = parts.netloc.rpartition("@")[0]
    url = f"postgresql://{user}@{parts.path}?"
    if in_front:
        url = f"postgresql://{user}@127.0.0.1:{dead},{quote(host, '')}:{port}{parts.path}?"
    else:
        url += urlencode({"host": f"127.0.0.1,{host}", "port": f"{dead},{port}"}) + "&"
    store = PostgresStore(f"{url}target_session_attrs=read-write", print, PgQueuerJobs())
    await store.start()
    await store.predictions.create(new(1))
    await accept_outcome(store, arrival(1, handlers=("greet",)))
    [claim] = (await store.claim(wanted())).claims
    assert await store.settle(settlement(claim))
    await store.stop()
