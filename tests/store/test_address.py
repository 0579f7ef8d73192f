"""URLs as hosts hand them out."""

import pytest

from receiver.model.errors import StoreUnusable
from receiver.store.postgres.address import read

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
def test_what_other_drivers_know_is_taken_or_dropped(url: str) -> None:
    found = read(url)
    assert found.dropped == TAKEN[url]
    assert not any(name in found.dsn for name in found.dropped)
    assert found.settings == {}
    assert "hu" not in found.place


def test_what_must_be_known_at_once_is_said_while_connecting() -> None:
    found = read(f"{AT}?options=endpoint%3Dep-1&application_name=mine&statement_timeout=5000")
    assert found.startup == {"options": "endpoint=ep-1", "application_name": "mine"}
    assert found.settings == {"statement_timeout": "5000"}


@pytest.mark.parametrize(("text", "seconds"), [("10", 10.0), ("0", None), ("", None)])
def test_the_time_to_connect_is_the_urls(text: str, seconds: float | None) -> None:
    assert read(f"{AT}?connect_timeout={text}").timeout == seconds


def test_the_systems_authorities_can_be_asked_for() -> None:
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
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_name(more: str, words: str) -> None:
    with pytest.raises(StoreUnusable, match="RECEIVER_DATABASE_URL") as refused:
        read(f"{AT}?{more}")
    assert words in str(refused.value)


@pytest.mark.parametrize("password", ["hu@sh", "hu/sh", "hu#sh", "hu?sh", "hu[sh", "hu@/sh"])
def test_a_password_that_is_not_encoded_is_named_as_such_and_not_said(password: str) -> None:
    with pytest.raises(StoreUnusable, match="percent-encode") as refused:
        read(f"postgresql://me:{password}@db.example/app")
    assert "hu" not in str(refused.value)
    assert "sh" not in str(refused.value)


@pytest.mark.parametrize("url", ["postgresql://me:hush/app", "postgresql://me:hush@h:hush/app"])
def test_a_port_that_is_none_is_not_said(url: str) -> None:
    with pytest.raises(StoreUnusable) as refused:
        read(url)
    assert "hush" not in str(refused.value)
