"""Settings: names, defaults, valid and invalid values, and that secrets stay hidden."""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, asdict
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.model.errors import SettingsError
from receiver.model.recipes import Limit
from receiver.providers import NAMES
from receiver.settings import Caller, Secret, Settings, env_file, parsers
from receiver.settings.advice import misspelled

STRONG: Final = "s" * 32
NEEDED: Final = {"RECEIVER_SECRET_KEY": STRONG}


def read(**env: str) -> Settings:
    return Settings.read({**NEEDED, **env})


def problems(env: Mapping[str, str]) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as refusal:
        Settings.read(env)
    return refusal.value.problems


def at(given: Settings, path: str) -> Any:
    """Follow a dotted path through attributes and mappings."""
    value: Any = given
    for name in path.split("."):
        value = value[name] if isinstance(value, Mapping) else getattr(value, name)
    return value


S1, S2 = Secret("a" * 32), Secret("b" * 40)

# Name, attribute path, default, and texts with the values they give.
TABLE: Final[list[tuple[str, str, Any, dict[str, Any]]]] = [
    (
        "RECEIVER_SECRET_KEY",
        "secret_keys",
        (Secret(STRONG),),
        {"a" * 32: (S1,), f" {'a' * 32} , {'b' * 40} ,": (S1, S2)},
    ),
    (
        "RECEIVER_API_KEYS",
        "api_keys",
        (),
        {
            "one": (Secret("one"),),
            "one, two": (Secret("one"), Secret("two")),
            "web: one,bot:t:wo, bot:three": (Secret("one"), Secret("t:wo"), Secret("three")),
            ",": (),
        },
    ),
    ("RECEIVER_VIEWER_KEYS", "viewer_keys", (), {"a:one,two": (Secret("one"), Secret("two"))}),
    (
        "RECEIVER_PUBLIC_URL",
        "public_url",
        None,
        {
            "https://hooks.example.org/": "https://hooks.example.org",
            "http://127.0.0.1:8000/base//": "http://127.0.0.1:8000/base",
            "https://[::1]:8000": "https://[::1]:8000",
        },
    ),
    (
        "RECEIVER_DATABASE_URL",
        "database_url",
        "sqlite:///receiver.db",
        {"sqlite:////var/lib/r.db": "sqlite:////var/lib/r.db"},
    ),
    ("RECEIVER_HANDLERS", "handlers", (), {"a.b, ./c.py,,": ("a.b", "./c.py")}),
    ("RECEIVER_MAX_BODY_BYTES", "max_body_bytes", 4194304, {"1": 1, " 1000 ": 1000}),
    (
        "RECEIVER_LIMIT_UNPROVED_PER_MINUTE",
        "limit_unproved_per_minute",
        600,
        {"5": 5, "none": None},
    ),
    *(
        (f"RECEIVER_LIMIT_{name}_PER_MINUTE", f"limit_{name.lower()}_per_minute", None, {"9": 9})
        for name in ("CALLBACKS", "API")
    ),
    (
        "RECEIVER_TRUSTED_PROXIES",
        "trusted_proxies",
        (ip_network("127.0.0.0/8"), ip_network("::1")),
        {
            "None": (),
            "Platform": "platform",
            "10.0.0.0/8, ::1": (ip_network("10.0.0.0/8"), ip_network("::1")),
        },
    ),
    (
        "RECEIVER_ROOT_PATH",
        "root_path",
        None,
        {"/": "", "none": "", "/api/": "/api", "/a/b-c": "/a/b-c"},
    ),
    ("RECEIVER_POLL_AFTER", "poll_after", None, {"30": 30.0, "0.5": 0.5}),
    ("RECEIVER_PREDICTION_TIMEOUT", "prediction_timeout", 3600.0, {"60": 60.0}),
    ("RECEIVER_RETRY_ATTEMPTS", "retry_attempts", 10, {"1": 1}),
    ("RECEIVER_RETRY_BASE", "retry_base", 2.0, {"0.1": 0.1}),
    ("RECEIVER_RETRY_CAP", "retry_cap", 3600.0, {"1e3": 1000.0}),
    ("RECEIVER_LOG_FORMAT", "log_format", None, {"JSON": "json", "console": "console"}),
    (
        "RECEIVER_LOG_LEVEL",
        "log_level",
        "info",
        {"debug": "debug", "Info": "info", "WARNING": "warning", "error": "error"},
    ),
    (
        "RECEIVER_RETENTION_DAYS",
        "retention",
        {},
        {
            "30": dict.fromkeys(("succeeded", "failed", "canceled"), 30.0),
            " failed = 0.5 , dead=7": {"failed": 0.5, "dead": 7.0},
            "30,Failed=90": {"succeeded": 30.0, "failed": 90.0, "canceled": 30.0},
        },
    ),
    (
        "RECEIVER_ALLOW_PRIVATE_FETCH",
        "allow_private_fetch",
        False,
        {"1": True, "true": True, "YES": True, "on": True, "0": False, "off": False, "No": False},
    ),
    ("RECEIVER_DEV", "dev", False, {"1": True, "false": False}),
    ("OXEN_API_KEY", "providers.oxen.key", None, {"k1": Secret("k1")}),
    ("EACHLABS_API_KEY", "providers.eachlabs.key", None, {"k2": Secret("k2")}),
    ("FAL_KEY", "providers.fal.key", None, {"id:secret": Secret("id:secret")}),
    ("FAL_ADMIN_KEY", "providers.fal.admin_key", None, {"k": Secret("k")}),
    ("RECEIVER_COSTS_BY", "costs_by", (), {"team, customer,team": ("team", "customer")}),
    (
        "RECEIVER_LIMITS",
        "limits",
        (),
        {
            '[{"by": "all", "per": "day", "cost": 20}]': (
                Limit(by="all", per="day", cost=20_000_000, of_orders=False),
            ),
            '[{"by": "metadata.team", "per": "hour", "count": 0}]': (
                Limit(by="metadata.team", per="hour", count=0, of_orders=False),
            ),
        },
    ),
    *(
        (name, f"providers.{path}", default, {"http://127.0.0.1:9/x/": "http://127.0.0.1:9/x"})
        for name, path, default in [
            ("OXEN_BASE_URL", "oxen.urls.base", "https://hub.oxen.ai"),
            ("EACHLABS_BASE_URL", "eachlabs.urls.base", "https://api.eachlabs.ai"),
            ("FAL_QUEUE_URL", "fal.urls.queue", "https://queue.fal.run"),
            ("FAL_RUN_URL", "fal.urls.run", "https://fal.run"),
            ("FAL_JWKS_URL", "fal.urls.jwks", "https://rest.fal.ai/.well-known/jwks.json"),
            ("FAL_META_URL", "fal.urls.meta", "https://api.fal.ai/v1/meta"),
            ("FAL_API_URL", "fal.urls.api", "https://api.fal.ai"),
        ]
    ),
    *(
        (f"{name.upper()}_{setting}", f"providers.{name}.{field}", default, {"3": 3, "None": None})
        for name, in_flight, per_minute in [
            ("oxen", None, None),
            ("eachlabs", 10, 100),
            ("fal", None, None),
        ]
        for setting, field, default in [
            ("MAX_IN_FLIGHT", "max_in_flight", in_flight),
            ("REQUESTS_PER_MINUTE", "requests_per_minute", per_minute),
        ]
    ),
    *(
        (
            f"{name.upper()}_ALLOWED_SOURCES",
            f"providers.{name}.allowed_sources",
            None,
            {"192.0.2.1,": (ip_network("192.0.2.1"),), **more},
        )
        for name, more in [("oxen", {}), ("eachlabs", {}), ("fal", {"Meta": "meta"})]
    ),
    ("EACHLABS_CONFIRM", "providers.eachlabs.confirm", False, {"1": True, "0": False}),
    (
        "FORWARD_HOSTS",
        "forward_hosts",
        (),
        {"Bot.example, [::1]:9,": ("bot.example", "[::1]:9"), "a:8443": ("a:8443",)},
    ),
]


def test_every_setting_has_its_default_and_reads_its_values() -> None:
    for name, path, default, texts in TABLE:
        assert at(read(), path) == default, name
        for text, meaning in texts.items():
            assert at(read(**{name: text}), path) == meaning, (name, text)


@pytest.mark.parametrize("blank", ["", "  "])
def test_blank_setting_counts_as_unset(blank: str) -> None:
    given = read(**{row[0]: blank for row in TABLE[1:]})
    assert {row[0]: at(given, row[1]) for row in TABLE[1:]} == {row[0]: row[2] for row in TABLE[1:]}


@pytest.mark.parametrize("around", ["{}\n", "{}\r\n", " {} ", "'{}'", '"{}"\r'])
def test_quotes_and_whitespace_around_a_value_are_removed(around: str) -> None:
    given = read(FAL_KEY=around.format("key"), RECEIVER_DEV=around.format("1"))
    assert given.providers["fal"].key == Secret("key")
    assert given.dev


def test_each_of_several_api_keys_may_be_quoted() -> None:
    assert read(RECEIVER_API_KEYS="'a', \"b\"").api_keys == (Secret("a"), Secret("b"))


def test_value_that_is_not_utf_8_is_rejected() -> None:
    [problem] = problems({"RECEIVER_SECRET_KEY": "hush\udcff" * 8})
    assert problem == "RECEIVER_SECRET_KEY: must be UTF-8"


def test_misspelled_value_is_rejected_with_a_suggestion() -> None:
    [problem] = problems({**NEEDED, "RECEIVER_LOG_LEVEL": "warn"})
    assert "did you mean warning?" in problem


def test_unknown_variables_are_ignored() -> None:
    assert read(RECEIVER_OTHER="x", PATH="/bin", oxen_api_key="x") == read()


def test_every_provider_has_settings() -> None:
    assert set(read().providers) == set(NAMES)


NO_URLS: Final = [
    "hooks.example.org",
    "ftp://hooks.example.org",
    "https://",
    "https:///path",
    "https://h.example/?a=b",
    "https://h.example/#a",
    "https://user:hush@h.example",
    "https://user@h.example",
    "https://:hush@h.example",
    "https://h.example:port",
    "https://h.example:99999",
    "https://h.example:0",
    "https://[::1",
    "https://h example",
    "https://h.ex\nample",
    "https://user:hush@h\u2100.example",
    "https://h.example?",
    "https://h.example/#",
    "https://h.example\\a",
    "https://h.example/a\\b",
]
NO_WHOLES: Final = ["0", "-1", "1.5", "many", "1_000", "+1", "²", "9" * 5000, str(2**31)]
NO_SECONDS: Final = ["0", "-1", "nan", "inf", "-inf", "soon", "1e9", "30s"]
NO_SWITCHES: Final = ["2", "maybe", "y", "truee"]
NO_NETWORKS: Final = ["10.0.0.1/8", "example.org", "*", ",", "1.2.3.4:80", "::1/129", "٣.1.1.1"]
REFUSED: Final[dict[str, list[str]]] = {
    "RECEIVER_API_KEYS": ["web:", ":hush", "w eb:hush", "a:hush,b:hush", "a:hush,hush"],
    "RECEIVER_VIEWER_KEYS": ["web:,hush"],
    "RECEIVER_SECRET_KEY": ["hush", "s" * 31, f"{STRONG},hush"],
    "RECEIVER_PUBLIC_URL": NO_URLS,
    "RECEIVER_ROOT_PATH": ["prod", "//", "/a b", "/a?b", "/a//b", "https://hooks.test/a"],
    "RECEIVER_DATABASE_URL": ["receiver.db", "sqlite:///", "sqlite://x", "mysql://u:hush@h/d"],
    "RECEIVER_MAX_BODY_BYTES": NO_WHOLES,
    "RECEIVER_POLL_AFTER": NO_SECONDS,
    "RECEIVER_PREDICTION_TIMEOUT": NO_SECONDS,
    "RECEIVER_RETRY_ATTEMPTS": NO_WHOLES,
    "RECEIVER_RETRY_BASE": NO_SECONDS,
    "RECEIVER_RETRY_CAP": NO_SECONDS,
    "RECEIVER_RETENTION_DAYS": [
        *("0", "-1", "nan", "inf", "1e6", "a month", "failed", "failed=", "=30", "processing=1"),
        "30,failed=0",
    ],
    "RECEIVER_LOG_FORMAT": ["xml"],
    "RECEIVER_LOG_LEVEL": ["loud", "critical"],
    "RECEIVER_ALLOW_PRIVATE_FETCH": NO_SWITCHES,
    "RECEIVER_DEV": NO_SWITCHES,
    "OXEN_API_KEY": ["hushé", "hu\nsh", "hu\x00sh"],
    "EACHLABS_API_KEY": ["hush٣"],
    "FAL_KEY": ["hush\x7f"],
    "FAL_ADMIN_KEY": ["hush\x7f"],
    "RECEIVER_COSTS_BY": ["a,b,c,d,e,f,g,h,i"],
    "RECEIVER_LIMITS": [
        *("all", "{}", "[1]", '[{"by": "person", "per": "day", "count": 1}]'),
        '[{"by": "all", "per": "week", "count": 1}]',
        '[{"by": "all", "per": "day", "cost": "hush"}]',
        '[{"by": "all", "per": "day", "count": -1}]',
        '[{"by": "all", "per": "day", "count": false}]',
        "[" * 100_000,
    ],
    "OXEN_BASE_URL": NO_URLS,
    "EACHLABS_BASE_URL": NO_URLS,
    "FAL_QUEUE_URL": NO_URLS,
    "FAL_RUN_URL": NO_URLS,
    "FAL_JWKS_URL": NO_URLS,
    "FAL_META_URL": NO_URLS,
    "FAL_API_URL": NO_URLS,
    "OXEN_MAX_IN_FLIGHT": NO_WHOLES,
    "EACHLABS_MAX_IN_FLIGHT": NO_WHOLES,
    "FAL_MAX_IN_FLIGHT": NO_WHOLES,
    "OXEN_REQUESTS_PER_MINUTE": NO_WHOLES,
    "EACHLABS_REQUESTS_PER_MINUTE": NO_WHOLES,
    "FAL_REQUESTS_PER_MINUTE": NO_WHOLES,
    "EACHLABS_CONFIRM": NO_SWITCHES,
    **{f"RECEIVER_LIMIT_{name}_PER_MINUTE": NO_WHOLES for name in ("UNPROVED", "CALLBACKS", "API")},
    "RECEIVER_TRUSTED_PROXIES": NO_NETWORKS,
    "OXEN_ALLOWED_SOURCES": [*NO_NETWORKS, "meta", "none"],
    "EACHLABS_ALLOWED_SOURCES": [*NO_NETWORKS, "meta", "none"],
    "FAL_ALLOWED_SOURCES": [*NO_NETWORKS, "meta, ::1", "none"],
    "FORWARD_HOSTS": [
        *("https://bot.example", "bot.example/x", "me@bot.example", "*.bot.example", "b:x", "b:0"),
        *("b\\x", "b x", "bü", "[::1", ",", ":80"),
    ],
    "OTEL_EXPORTER_OTLP_ENDPOINT": ["collector", "collector:4318", "ftp://collector"],
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": ["collector:4318"],
}


def test_invalid_value_is_one_problem_that_names_the_setting() -> None:
    for name, text in [(name, text) for name, texts in REFUSED.items() for text in texts]:
        found = problems({"RECEIVER_DEV": "1", **NEEDED, name: text})
        assert len(found) == 1, (name, text, found)
        [problem] = found
        assert problem.startswith(f"{name}: "), text
        assert "must" in problem or "digits" in problem, (name, text)
        assert "hush" not in problem, (name, text)


def test_every_setting_has_invalid_values_in_this_file() -> None:
    anything_goes = {"RECEIVER_HANDLERS"}
    ours = {name for name in REFUSED if not name.startswith("OTEL_")}
    assert ours | anything_goes == {row[0] for row in TABLE}


def test_all_invalid_settings_are_reported_at_once() -> None:
    env = {name: texts[0] for name, texts in REFUSED.items()}
    with pytest.raises(SettingsError) as refusal:
        Settings.read(env)
    found = refusal.value.problems
    assert sorted(problem.partition(":")[0] for problem in found) == sorted(REFUSED)
    assert all(f"  - {problem}" in str(refusal.value).splitlines() for problem in found)


@pytest.mark.parametrize("text", ["", "  ", ",", " , "])
def test_missing_secret_key_error_tells_how_to_make_one(text: str) -> None:
    [problem] = problems({"RECEIVER_SECRET_KEY": text})
    assert "openssl rand -hex 32" in problem
    assert "--dev" in problem


def test_dev_mode_needs_no_secret_key() -> None:
    assert Settings.read({"RECEIVER_DEV": "1"}).secret_keys == ()


@pytest.mark.parametrize(
    ("url", "path"),
    [("sqlite:///receiver.db", "receiver.db"), ("sqlite:////var/r.db", "/var/r.db")],
)
def test_sqlite_url_names_a_file(url: str, path: str) -> None:
    given = read(RECEIVER_DATABASE_URL=url)
    assert given.sqlite_path == given.database == path


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:hush@db.test:5433/books", "postgresql://db.test:5433/books"),
        ("postgres://me:hush@db.test/books", "postgresql://db.test/books"),
        ("postgresql://db.test/books?user=me&password=hush", "postgresql://db.test/books"),
        ("postgresql://me:hush%40more@a.test,b.test/books", "postgresql://a.test,b.test/books"),
        ("postgresql:///books?host=/run/postgresql", "postgresql:///books"),
    ],
)
def test_postgres_url_is_shown_without_credentials(url: str, shown: str) -> None:
    given = read(RECEIVER_DATABASE_URL=url)
    assert given.sqlite_path is None
    assert given.database_url == url
    assert given.database == shown
    for text in (str(given), repr(given), f"{given!r}"):
        assert "hush" not in text


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hu/sh@db.test/books",
        "postgresql://me:hu?sh@db.test/books",
        "postgresql://me:hu#sh@db.test/books",
        "postgresql://me:hu[sh@db.test/books",
        *(f"postgresql://me:12{mark}hush@db.test/books" for mark in "/?#"),
        "postgresql://me:hush@db.test:port/books",
        "postgresql://me:hush@db.test:99999/books",
    ],
)
def test_malformed_postgres_url_is_rejected_without_showing_it(url: str) -> None:
    """Otherwise a part of an unescaped password would appear in the log."""
    [problem] = problems({"RECEIVER_DEV": "1", "RECEIVER_DATABASE_URL": url})
    assert problem.startswith("RECEIVER_DATABASE_URL: ")
    assert "hu" not in problem


@pytest.mark.parametrize(
    "url", ["mysql://x/y", "receiver.db", "postgresql:x", "hush@postgresql://"]
)
def test_unsupported_database_url_is_rejected_without_showing_it(url: str) -> None:
    [problem] = problems({"RECEIVER_DEV": "1", "RECEIVER_DATABASE_URL": url})
    assert problem.startswith("RECEIVER_DATABASE_URL: must be sqlite:///path")
    assert "hush" not in problem


def test_settings_are_immutable() -> None:
    given = read()
    with pytest.raises(FrozenInstanceError):
        given.dev = True  # type: ignore[misc] # the point
    with pytest.raises(FrozenInstanceError):
        given.providers["fal"].confirm = True  # type: ignore[misc] # the point


SECRETS: Final = {
    "RECEIVER_SECRET_KEY": "hush-secret-key-0123456789-0123456789",
    "RECEIVER_API_KEYS": "hush-api-1,web:hush-api-2",
    "RECEIVER_VIEWER_KEYS": "hush-view",
    "OXEN_API_KEY": "hush-oxen",
    "EACHLABS_API_KEY": "hush-eachlabs",
    "FAL_KEY": "hush-id:hush-fal",
    "FAL_ADMIN_KEY": "hush-admin",
}


def test_secrets_never_show_in_settings() -> None:
    given = Settings.read(SECRETS)
    shown = [given, asdict(given), given.providers, copy.deepcopy(given), given.secret_keys]
    for thing in shown:
        for text in (str(thing), repr(thing), f"{thing}", f"{thing!r}", "%s" % (thing,)):  # noqa: UP031
            assert "hush" not in text
            assert "Secret('**********')" in text
    key = given.providers["fal"].key
    assert key is not None
    assert key.reveal() == "hush-id:hush-fal"


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_never_show_in_an_error(name: str) -> None:
    env = {**SECRETS, name: "hush\u00e9", "RECEIVER_POLL_AFTER": "never"}
    with pytest.raises(SettingsError) as refusal:
        Settings.read(env)
    error = refusal.value
    for text in (str(error), repr(error), *traceback.format_exception(error)):
        assert "hush" not in text


def test_secrets_compare_and_hash_by_value() -> None:
    assert Secret("a") == Secret("a")
    assert hash(Secret("a")) == hash(Secret("a"))
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert not hasattr(Secret("a"), "__dict__")


@settings(max_examples=100)
@given(env=st.dictionaries(st.sampled_from([row[0] for row in TABLE]), st.text(max_size=40)))
def test_any_environment_is_read_or_rejected_with_named_problems(env: dict[str, str]) -> None:
    try:
        given = Settings.read(env)
    except SettingsError as error:
        found = error.problems
    else:
        found = ()
        assert given.secret_keys or given.dev
    names = tuple(row[0] for row in TABLE)
    assert all(problem.startswith(names) for problem in found)


def test_server_prefers_the_api_keys_list_and_client_the_single_key() -> None:
    one, two = Secret("one"), Secret("two")
    assert read(RECEIVER_API_KEY="one").api_keys == (one,)
    assert read(RECEIVER_API_KEY="one", RECEIVER_API_KEYS="two").api_keys == (two,)
    assert read(RECEIVER_API_KEY="one", RECEIVER_API_KEYS=",").api_keys == ()
    assert read(RECEIVER_API_KEY="web:one").api_keys[0].name == "web"
    assert Caller.read({"RECEIVER_API_KEYS": "two,one"}).key == two
    assert Caller.read({"RECEIVER_API_KEYS": ","}).key is None
    assert Caller.read({"RECEIVER_API_KEY": "one", "RECEIVER_API_KEYS": "two"}).key == one


def test_api_keys_may_have_names_and_no_key_has_two_roles() -> None:
    given = read(RECEIVER_API_KEYS="web:one,two,bot:t:hree", RECEIVER_VIEWER_KEYS="ops:four")
    assert [key.name for key in (*given.api_keys, *given.viewer_keys)] == [
        "web",
        None,
        "bot",
        "ops",
    ]
    assert Caller.read({"RECEIVER_API_KEYS": "web:one"}).key == Secret("one")
    assert Caller.read({"RECEIVER_API_KEY": "web:one"}).key == Secret("one")
    [problem] = problems({**NEEDED, "RECEIVER_API_KEYS": "a:x,y", "RECEIVER_VIEWER_KEYS": "y"})
    assert problem.startswith("RECEIVER_VIEWER_KEYS: must have no key of RECEIVER_API_KEYS")
    for more in ("RECEIVER_API_KEYS", "RECEIVER_API_KEY", "RECEIVER_VIEWER_KEYS"):
        for name in ("RECEIVER_CRON_SECRET", "CRON_SECRET"):
            [problem] = problems({**NEEDED, more: "a:x", name: "y, x"})
            assert problem.startswith("RECEIVER_CRON_SECRET, or CRON_SECRET, must have no key of")


def test_unknown_setting_gets_the_nearest_name_as_suggestion() -> None:
    env = {"RECEIVER_PUBLIC_ULR": "x", "RECEIVER_URL": "x", "RECEIVER_PORT_80_TCP": "x"}
    assert misspelled({**NEEDED, **env}) == [
        "RECEIVER_PUBLIC_ULR is not a setting (did you mean RECEIVER_PUBLIC_URL?)"
    ]


def test_env_file_is_read_literally_and_rejected_if_world_writable(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    assert env_file.read(file) == {}
    file.write_text("A=1 # one\nexport B='x$HOME${A}'\nC\n")
    assert env_file.read(file) == {"A": "1", "B": "x$HOME${A}"}
    file.chmod(0o666)
    with pytest.raises(SettingsError, match="can be written by everyone: chmod 600"):
        env_file.read(file)
    file.chmod(0o600)
    for content, words in ((b"\xff", "not UTF-8"), (b"A=\0", "not a list of settings")):
        file.write_bytes(content)
        with pytest.raises(SettingsError, match=words):
            env_file.read(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(SettingsError, match="is not a file"):
        env_file.read(file)


@pytest.mark.parametrize(
    ("path", "given", "base"),
    [
        ("/v1", "https://api.acme.ai/v1", "https://api.acme.ai"),
        ("/v1", "https://api.acme.ai/v1/", "https://api.acme.ai"),
        ("/v1", "https://api.acme.ai", "https://api.acme.ai"),
        ("/v1", "http://127.0.0.1:8001/acme/v1", "http://127.0.0.1:8001/acme"),
        ("/api/v3", "https://api.acme.ai/api/v3", "https://api.acme.ai"),
        ("/api/v3", "https://api.acme.ai/api", "https://api.acme.ai"),
        ("/api/v3", "https://api.acme.ai/v3", "https://api.acme.ai/v3"),
        ("", "https://api.acme.ai/v1", "https://api.acme.ai/v1"),
    ],
)
def test_base_url_may_include_the_path_of_the_sdk(path: str, given: str, base: str) -> None:
    assert parsers.base_url(path, given) == base
