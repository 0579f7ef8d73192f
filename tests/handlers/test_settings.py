"""Settings of handlers are declared and read, and all problems are reported at once."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from standardwebhooks import Webhook

from receiver import Secret, read_settings
from receiver.deliveries.importing import load
from receiver.deliveries.registry import Registry
from receiver.model.errors import HandlerError
from receiver.testing import Kit, make_event
from tests.handlers.parts import HANDLERS, OK, built_in, serving

Kits = Callable[..., Kit]

# apprise's plugins import imghdr.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")

KEY: Final = b"\xfb\xef a secret of thirty-two bytes"
PLAIN: Final = base64.b64encode(KEY).decode()
HOOK: Final = "https://x.example/hook"

GOOD: Final[dict[str, dict[str, str]]] = {
    "save": {"SAVE_URL": "{tmp}"},
    "forward": {"FORWARD_URL": HOOK, "FORWARD_SECRET": f"whsec_{PLAIN}"},
    "notify": {"NOTIFY_URLS": "json://127.0.0.1"},
    "slack": {"SLACK_TOKEN": "xoxb-1-hunter2", "SLACK_CHANNEL": "C0123456789"},
    "discord": {"DISCORD_WEBHOOK": "https://discord.com/api/webhooks/1/hunter2"},
    "telegram": {"TELEGRAM_TOKEN": "1:hunter2", "TELEGRAM_CHAT": "-100123"},
    "slack_in": {
        "SLACK_SIGNING_SECRET": "0123456789abcdef,hunter2hunter2hunter2",
        "SLACK_TOKEN": "xoxb-1",
    },
    "discord_in": {
        "DISCORD_PUBLIC_KEY": "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8",
        "DISCORD_APPLICATION": "1000000000000000001",
        "DISCORD_TOKEN": "a.b.hunter2",
    },
    "telegram_in": {"TELEGRAM_TOKEN": "1:hunter2"},
    "github": {"GITHUB_TOKEN": "ghp_hunter2", "GITHUB_REPOSITORY": "ann/art"},
    "command": {"COMMAND": "true"},
    "chain": {"CHAIN_PROVIDER": "fal", "CHAIN_MODEL": "m", "CHAIN_INPUT": '{"u": "{url}"}'},
}
NAMES: Final = re.compile(
    "(" + "|".join(name.upper() for name in GOOD) + r")(_\w+)?|(AWS|AZURE|GOOGLE)_\w+"
)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Return a function that sets valid settings, except those given, and returns the file."""

    def use(handler: str, **more: str) -> str:
        for name in [name for name in os.environ if NAMES.fullmatch(name)]:
            monkeypatch.delenv(name)
        for name, value in {**GOOD[handler], **more}.items():
            monkeypatch.setenv(name, value.replace("{tmp}", str(tmp_path / "out")))
        return built_in(handler)

    return use


@pytest.mark.parametrize("handler", GOOD)
def test_carriage_returns_blanks_and_quotes_of_env_files_are_ignored(
    use: Callable[..., str], handler: str
) -> None:
    given = GOOD[handler]
    load([use(handler, **{name: f" {value}\r\n" for name, value in given.items()})])
    load([use(handler, **{name: f"'{value}'\r" for name, value in given.items()})])


WRONG: Final[list[tuple[str, dict[str, str], str]]] = [
    *(
        ("save", {"SAVE_MAX_BYTES": value}, "SAVE_MAX_BYTES must be")
        for value in ("-1", "0", "nan", "1e9", "many", "256 MB", "1.5MB", "9" * 20)
    ),
    *(
        (handler, {f"{handler.upper()}_MAX_BYTES": "0"}, f"{handler.upper()}_MAX_BYTES must be")
        for handler in ("notify", "slack", "discord", "telegram")
    ),
    ("save", {"SAVE_TYPES": "png"}, "SAVE_TYPES must be content types"),
    ("save", {"SAVE_TYPES": "image/,pictures/"}, "not 'pictures/'"),
    ("save", {"SAVE_PUBLIC_URL": "x.example"}, "SAVE_PUBLIC_URL must be an address"),
    ("save", {"SAVE_NAME": "../{id}"}, "SAVE_NAME must name a file below SAVE_URL"),
    ("save", {"SAVE_NAME": "{id}/"}, "SAVE_NAME must name a file"),
    ("save", {"SAVE_NAME": "{nothing}.png"}, "SAVE_NAME"),
    ("save", {"SAVE_NAME": "{id"}, "SAVE_NAME"),
    ("save", {"SAVE_URL": "/proc/nowhere"}, "SAVE_URL is a folder that cannot be made"),
    ("save", {"SAVE_URL": "/dev/null"}, "SAVE_URL is a folder that cannot be made"),
    ("save", {"SAVE_URL": "/dev/null/deeper"}, "SAVE_URL is a folder that cannot be made"),
    ("save", {"SAVE_URL": "ftp://a/b"}, "SAVE_URL must be a folder or a store"),
    ("save", {"SAVE_URL": "s3://b", "AWS_ENDPOINT_URL": "minio:9000"}, "needs AWS_ENDPOINT_URL"),
    ("save", {"SAVE_URL": "s3://b", "AWS_ENDPOINT_URL": "http://m\r"}, "needs AWS_ENDPOINT_URL"),
    *(
        ("save", {"SAVE_URL": "s3://b", name: value}, f"SAVE_URL needs {name} without blanks")
        for name, value in (
            ("AWS_ACCESS_KEY_ID", "hunter2\r"),
            ("AWS_REGION", " eu"),
            ("AWS_SESSION_TOKEN", "hunter2\n"),
            ("AWS_SECRET_ACCESS_KEY", '"hunter2"'),
            ("AZURE_STORAGE_ACCOUNT_KEY", "'hunter2'"),
            ("GOOGLE_SERVICE_ACCOUNT", "/hunter2.json\r"),
        )
    ),
    *(
        ("notify", {name: "/nowhere.pem"}, f"{name} names /nowhere.pem, which is not there")
        for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    ),
    *(
        ("forward", {name: value}, "FORWARD_URL and FORWARD_SECRET")
        for name, value in (("FORWARD_URL", ""), ("FORWARD_SECRET", ""), ("FORWARD_SECRET", "  "))
    ),
    ("forward", {"FORWARD_FORMAT": "xml"}, "FORWARD_FORMAT must be one of standard, cloudevents, "),
    *(
        ("forward", {"FORWARD_URL": url}, "FORWARD_URL must be an address")
        for url in ("x.example", "ftp://x.example", "https://", "http://x y", "http://x:99999")
    ),
    *(
        ("forward", {"FORWARD_SECRET": secret}, "FORWARD_SECRET must be whsec_")
        for secret in (
            "whsec_aHVudGVyMg==",
            "whsec_abc",
            "whsec_not*base64",
            f"whsec_{PLAIN.replace('+', '-').replace('/', '_')}",
            f"whsec_{base64.b64encode(bytes(65)).decode()}",
            f"v1a,whsk_{PLAIN}",
            f"whsec_{PLAIN},whsec_{PLAIN}",
            f"whsec_{PLAIN} hunter2",
        )
    ),
    ("slack", {"SLACK_TEXT": "{nothing}"}, "is not a field"),
    ("slack", {"SLACK_TOKEN": ""}, "needs SLACK_TOKEN"),
    ("slack", {"SLACK_TOKEN": "hunter2"}, "SLACK_TOKEN must be whole"),
    ("slack", {"SLACK_TOKEN": "xoxb-\nhunter2"}, "SLACK_TOKEN must be whole"),
    ("slack", {"SLACK_CHANNEL": ""}, "needs SLACK_CHANNEL"),
    ("slack", {"SLACK_CHANNEL": "#art"}, "SLACK_CHANNEL must be"),
    ("slack", {"SLACK_URL": "http://slack.example/api"}, "SLACK_URL must be"),
    ("slack_in", {"SLACK_SIGNING_SECRET": ""}, "needs SLACK_SIGNING_SECRET"),
    ("slack_in", {"SLACK_SIGNING_SECRET": "hunter2"}, "must be of 16 to 200 characters"),
    ("slack_in", {"SLACK_ADMINS": "ann"}, "SLACK_ADMINS must be ids of people"),
    *(
        ("discord", {"DISCORD_WEBHOOK": url}, "DISCORD_WEBHOOK must be")
        for url in ("http://discord.com/api/webhooks/1/hunter2", "https://discord.com/api/hunter2")
    ),
    ("discord", {"DISCORD_URL": "ftp://a"}, "DISCORD_URL must be"),
    ("discord_in", {"DISCORD_PUBLIC_KEY": "03a1"}, "DISCORD_PUBLIC_KEY must be the application's"),
    ("discord_in", {"DISCORD_APPLICATION": "imagine"}, "DISCORD_APPLICATION must be"),
    ("telegram_in", {"TELEGRAM_TOKEN": "hunter2"}, "TELEGRAM_TOKEN must be whole"),
    ("telegram_in", {"TELEGRAM_ADMINS": "@ann"}, "TELEGRAM_ADMINS must be ids of people"),
    ("telegram_in", {"TELEGRAM_POLL": "perhaps"}, "TELEGRAM_POLL must be one of"),
    ("telegram", {"TELEGRAM_TOKEN": ""}, "needs TELEGRAM_TOKEN"),
    ("telegram", {"TELEGRAM_TOKEN": "hunter2"}, "TELEGRAM_TOKEN must be whole"),
    ("telegram", {"TELEGRAM_TOKEN": "1:a\nhunter2"}, "TELEGRAM_TOKEN must be whole"),
    ("telegram", {"TELEGRAM_CHAT": ""}, "needs TELEGRAM_CHAT"),
    ("telegram", {"TELEGRAM_CHAT": "art"}, "TELEGRAM_CHAT must be"),
    ("telegram", {"TELEGRAM_URL": "https://a:hunter2@b.example"}, "TELEGRAM_URL must be"),
    ("telegram", {"TELEGRAM_URL": "http://telegram.example"}, "TELEGRAM_URL must be"),
    ("github", {"GITHUB_API_URL": "http://git.example"}, "GITHUB_API_URL must be"),
    ("github", {"GITHUB_API_URL": "api.github.com"}, "GITHUB_API_URL must be"),
    ("github", {"GITHUB_TOKEN": ""}, "needs GITHUB_TOKEN"),
    ("github", {"GITHUB_TOKEN": "ghp_ hunter2"}, "GITHUB_TOKEN must be whole"),
    ("github", {"GITHUB_TOKEN": "ghp_one\nhunter2"}, "GITHUB_TOKEN must be whole"),
    ("github", {"GITHUB_REPOSITORY": ""}, "needs GITHUB_REPOSITORY as owner/name"),
    (
        *("github", {"GITHUB_REPOSITORY": "https://github.com/ann/art"}),
        "GITHUB_REPOSITORY must be owner/name",
    ),
    *(("command", {"COMMAND": text}, "needs COMMAND") for text in ("", "  ")),
    ("command", {"COMMAND": "echo 'open"}, "every quote closed"),
    *(
        ("command", {"COMMAND": f"{program} x"}, f"'{program}' is not a program")
        for program in ("no-such-program-at-all", "/etc/passwd")
    ),
    ("command", {"COMMAND_RAW": "perhaps"}, "COMMAND_RAW must be one of"),
    *(
        ("command", {"COMMAND_TIMEOUT": value}, "COMMAND_TIMEOUT must be a number")
        for value in ("-1", "0", "soon", "nan", "inf")
    ),
    ("command", {"COMMAND_DIR": "/no/such/folder"}, "COMMAND_DIR"),
    ("chain", {"CHAIN_PROVIDER": ""}, "CHAIN_PROVIDER and CHAIN_MODEL"),
    ("chain", {"CHAIN_MODEL": ""}, "CHAIN_PROVIDER and CHAIN_MODEL"),
    ("chain", {"CHAIN_INPUT": ""}, "needs CHAIN_INPUT as a JSON object"),
    ("chain", {"CHAIN_INPUT": '["{url}"]'}, "CHAIN_INPUT must be a JSON object"),
    ("chain", {"CHAIN_INPUT": '{"a": "{nothing}"}'}, "is not a field"),
    ("chain", {"CHAIN_INPUT": '{"a": [{"b": "{prompt.__class__}"}]}'}, "is not a field"),
    ("chain", {"CHAIN_INPUT": '{"a": "{"}'}, "CHAIN_INPUT"),
    *(
        ("chain", {"CHAIN_METADATA": text}, "CHAIN_METADATA must be a JSON object")
        for text in ("[1]", "{")
    ),
    *(
        ("chain", {"CHAIN_DEPTH": value}, "CHAIN_DEPTH must be a whole number")
        for value in ("-1", "1.5", "deep")
    ),
]


@pytest.mark.parametrize(("handler", "more", "said"), WRONG)
def test_invalid_setting_is_reported_in_one_line_that_names_it(
    use: Callable[..., str], handler: str, more: dict[str, str], said: str
) -> None:
    with pytest.raises(HandlerError) as raised:
        load([use(handler, **more)])
    [line] = str(raised.value).splitlines()
    assert re.match(rf"{re.escape(built_in(handler))}:\d+: ", line)
    assert said in line
    assert "hunter2" not in line


def test_problems_of_all_handlers_are_reported_at_once(
    use: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [use("slack"), use("command", SAVE_TYPES="png", SAVE_MAX_BYTES="256M")]
    monkeypatch.setenv("COMMAND_TIMEOUT", "soon")
    with pytest.raises(HandlerError) as raised:
        load([*files, built_in("save")])
    lines = str(raised.value).splitlines()
    assert [Path(line.partition(":")[0]).name for line in lines] == [
        *("slack.py", "slack.py"),
        "command.py",
        *("save.py", "save.py"),
    ]


def test_settings_of_handlers_that_are_not_served_are_not_checked(
    use: Callable[..., str],
) -> None:
    assert load([use("command", SAVE_MAX_BYTES="x", FORWARD_URL="y", SLACK_TOKEN="")]).handlers


@pytest.mark.parametrize(
    "secret", [f"whsec_{PLAIN}", PLAIN, f"v1,whsec_{PLAIN}", f"whsec_{PLAIN.rstrip('=')}"]
)
def test_every_form_of_the_forward_secret_signs_with_the_same_key(
    use: Callable[..., str], receiver_kit: Kits, secret: str
) -> None:
    with serving(OK) as server:
        kit = receiver_kit(
            use("forward", FORWARD_URL=server.url, FORWARD_SECRET=secret), online=True
        )
        assert kit.deliver(make_event()).delivery.state == "done"
    [asked] = server.asked
    Webhook(KEY).verify(asked.body, asked.headers)


def test_program_path_may_contain_a_blank(use: Callable[..., str], tmp_path: Path) -> None:
    program = tmp_path / "my program"
    program.symlink_to("/bin/true")
    load([use("command", COMMAND=f'"{program}"')])


def test_tilde_is_expanded_to_the_home_folder(use: Callable[..., str], tmp_path: Path) -> None:
    file = use("save", SAVE_URL="~/pics", HOME=str(tmp_path))
    load([file])
    assert (tmp_path / "pics").is_dir()


# --- read_settings in a custom handler ---


def test_custom_handler_declares_its_settings() -> None:
    env = {"SHOP_URL": '"https://shop.example/"', "SHOP_TOKEN": "hunter2\r", "SHOP_TEXT": '"{id}"'}
    with read_settings(env) as read:
        url = read.url("SHOP_URL", "where orders go")
        token = read.secret("SHOP_TOKEN", "a key")
        text = read.text("SHOP_TEXT", "words")
        size = read.size("SHOP_MAX_BYTES", "the largest picture", default="8MB")
        wait = read.seconds("SHOP_WAIT", "how long to wait", default="1.5")
        loud = read.switch("SHOP_LOUD", "whether to shout")
    assert (url, text, size, wait, loud) == (
        *("https://shop.example/", "{id}", 8_000_000, 1.5),
        False,
    )
    assert token == Secret("hunter2")
    assert "hunter2" not in f"{token!r} {token}"


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("10B", 10), ("2kB", 2000), ("3KiB", 3072), ("256mb", 256 * 10**6)]
)
def test_sizes_have_units(text: str, size: int) -> None:
    with read_settings({"A": text}) as read:
        assert read.size("A", "a size") == size


def test_missing_settings_are_reported_with_their_descriptions() -> None:
    def declare() -> None:
        with read_settings({"B": " "}) as read:
            read.text("A", "the first")
            read.size("B", "the second")
            read.refuse("A and B go together")

    with pytest.raises(HandlerError) as raised:
        declare()
    said = [line.partition(": ")[2] for line in str(raised.value).splitlines()]
    assert said == ["needs A as the first", "needs B as the second", "A and B go together"]


def test_error_caused_by_a_missing_setting_reports_that_setting() -> None:
    def declare() -> None:
        with read_settings({}) as read:
            read.secret("A", "a key").reveal()

    with pytest.raises(HandlerError, match="needs A as a key"):
        declare()


def test_setting_read_outside_the_with_block_is_rejected() -> None:
    """Outside the block, a missing setting would not be reported."""
    with pytest.raises(HandlerError, match=r"test_settings.py:\d+: A is to be read within `with"):
        read_settings({}).text("A", "words")
    with read_settings({}) as read, pytest.raises(HandlerError, match="must be a text, not 8"):
        read.size("A", "a size", default=8)  # type: ignore[arg-type] # deliberately wrong


def test_misspelled_setting_is_reported_with_a_suggestion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with read_settings({}) as read:
        read.text("SHOP_LOOK", "how it looks", default="")
        read.text("SHOP_HOME", "where it is", default="")
        read.text("RECEIVER_RECIPES", "the receiver's own, as RECEIVER_PRICES is", default="")
    for name in ("SHOP_LOKO", "SHOP_HOMES", "SHOP_HOME", "SHOP_OTHER", "STOP_LOOK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RECEIVER_PRICES", "prices.toml")
    told = [warning for warning in Registry().warnings(()) if "is not a setting" in warning]
    assert told == ["SHOP_LOKO is not a setting (did you mean SHOP_LOOK?)"]


# --- names of packages ---

MAIN: Final = """
import json, sys
from receiver import Event, on
{more}
@on("*", name="mine")
def mine(event: Event) -> None: ...
"""


def installed(folder: Path) -> Path:
    """Create the files that a wheel installs, as building a wheel is slow."""
    site = folder / "site"
    info = site / "prediction_receiver-0.1.0.dist-info"
    info.mkdir(parents=True)
    (site / "receiver").symlink_to(HANDLERS.parent / "receiver")
    (site / "receiver_handlers").symlink_to(HANDLERS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: prediction-receiver\nVersion: 1\n")
    names = [path.stem for path in HANDLERS.glob("*.py") if path.stem != "__init__"]
    lines = [f"{name} = receiver_handlers.{name}" for name in names]
    (info / "entry_points.txt").write_text("\n".join(["[receiver.handlers]", *lines]))
    return site


@pytest.mark.parametrize(
    ("files", "given", "more"),
    [
        ({"handlers.py": MAIN.format(more="")}, ["handlers.py", "log"], []),
        ({"handlers.py": MAIN.format(more="")}, ["log", "handlers.py"], ["."]),
        (
            {
                "handlers/__init__.py": "x = 1",
                "handlers/log.py": "y = 2",
                "main.py": MAIN.format(
                    more="from handlers import x\nfrom handlers.log import y\nassert x + y == 3"
                ),
            },
            ["main.py", "log"],
            [],
        ),
        (
            {"handlers/log.py": "y = 2", "main.py": MAIN.format(more="from handlers.log import y")},
            ["log", "main.py"],
            ["."],
        ),
    ],
)
def test_custom_handlers_do_not_collide_with_built_in_ones(
    tmp_path: Path, files: dict[str, str], given: list[str], more: list[str]
) -> None:
    for name, text in files.items():
        (tmp_path / "app" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "app" / name).write_text(text)
    code = (
        "import json, sys; from receiver.deliveries.importing import load; "
        "found = load(sys.argv[1:]).handlers; import receiver_handlers; "
        "print(json.dumps([sorted(found), receiver_handlers.__file__]))"
    )
    path = os.pathsep.join([*more, str(installed(tmp_path))])
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code, *given],
        cwd=tmp_path / "app",
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found: list[Any] = json.loads(ran.stdout)
    assert found == [["log", "mine"], str(tmp_path / "site" / "receiver_handlers" / "__init__.py")]
