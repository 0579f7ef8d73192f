"""The command line as a user runs it: real processes, real sockets, real exit codes."""

from __future__ import annotations

import inspect
import json
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from rich.text import Text
from typer.testing import Result

from receiver import emulator
from receiver.cli.commands import main
from receiver.cli.program import PANELS
from receiver.cli.tables import age, plain_cell, print_table
from receiver.emulator import settings_for
from tests.cli.running import (
    SECRET,
    environment,
    from_scratch,
    inside,
    invoke,
    receiver,
    running,
)
from tests.forked import Forked
from tests.journey.parts import eventually
from tests.loopback import free_port
from tests.patience import PATIENCE
from tests.predictions.test_recipes import EXAMPLE


def start(*args: str, port: int, cwd: Path, **env: str) -> Forked:
    log = cwd / f"{args[0]}.log"
    command = ["-m", "receiver", *args, "--port", str(port)]
    process = Forked(command, cwd, environment(env), log, log)
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.02)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """Run a receiver against an emulator; yield its folder and a client's environment."""
    home = tmp_path_factory.mktemp("world")
    (home / "mine.py").write_text(
        "from receiver import Dead, Event, on\n\n\n"
        '@on("*", name="mine")\ndef mine(event: Event) -> None:\n'
        '    if "dead" in event.prediction.metadata:\n        raise Dead("on purpose")\n'
    )
    (home / "recipes.toml").write_text(EXAMPLE)
    emulator_port, port = free_port(), free_port()
    emulator = start("emulate", "--seconds", "0.05", port=emulator_port, cwd=home)
    settings = settings_for(f"http://127.0.0.1:{emulator_port}")
    server = start(
        "serve",
        "mine.py",
        port=port,
        cwd=home,
        RECEIVER_SECRET_KEY=SECRET,
        RECEIVER_API_KEYS="key",
        RECEIVER_PUBLIC_URL=f"http://127.0.0.1:{port}",
        OXEN_API_KEY="o",
        EACHLABS_API_KEY="e",
        FAL_KEY="f",
        RECEIVER_RECIPES="recipes.toml",
        **settings,
    )
    yield home, {"RECEIVER_URL": f"http://127.0.0.1:{port}", "RECEIVER_API_KEY": "key"}
    for process in (server, emulator):
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def show(name: str, home: Path, env: dict[str, str]) -> dict[str, Any]:
    return dict(json.loads(inside("show", name, "--json", cwd=home, **env).stdout))


def wait_until_delivered(name: str, home: Path, env: dict[str, str]) -> None:
    """Wait until every delivery of an ended prediction is done."""
    eventually(
        lambda: [row["state"] for row in show(name, home, env)["deliveries"]],
        lambda states: states == ["done"],
    )


def wait_until_dead(name: str, attempts: int, home: Path, env: dict[str, str]) -> dict[str, Any]:
    """Wait until the delivery of a prediction is dead after this many attempts; return it."""

    def dead() -> list[dict[str, Any]]:
        listed = inside("deliveries", "--state", "dead", "--json", cwd=home, **env)
        rows = [row for row in _lines(listed.stdout) if row["prediction_id"] == name]
        return [row for row in rows if len(row["history"]) == attempts]

    [found] = eventually(dead)
    return found


def test_submit_with_wait_then_list_and_show_the_prediction(
    world: tuple[Path, dict[str, str]],
) -> None:
    home, env = world
    done = receiver(
        "submit", "fal", "fal-ai/nano-banana", "prompt=a lighthouse", "num_images=1", "--wait",
        "--metadata", "channel=#art", cwd=home, **env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    prediction = json.loads(done.stdout)
    assert prediction["status"] == "succeeded"
    assert prediction["input"] == {"prompt": "a lighthouse", "num_images": 1}
    assert prediction["metadata"] == {"channel": "#art"}
    assert prediction["id"] in receiver("list", "--provider", "fal", cwd=home, **env).stdout
    shown = json.loads(receiver("show", prediction["id"], "--json", cwd=home, **env).stdout)
    assert [row["handler"] for row in shown["deliveries"]] == ["mine"]


def test_recipes_are_listed_explained_and_ordered(
    world: tuple[Path, dict[str, str]],
) -> None:
    home, env = world
    listed = inside("recipes", cwd=home, **env).stdout
    assert re.search(r"imagine +A picture from words +prompt ratio count seed +\$0.04", listed)
    explained = inside("recipes", "imagine", cwd=home, **env).stdout
    assert "imagine <prompt> --ratio 1:1" in explained
    assert json.loads(inside("recipes", "--json", cwd=home, **env).stdout.splitlines()[0])

    words = ("a", "lighthouse", "--ratio", "16:9", "count=2", "--wait")
    done = inside("order", "imagine", *words, "--metadata", "a=b", "--key", "k", cwd=home, **env)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["input"] == {"prompt": "a lighthouse", "aspect_ratio": "16:9", "num_images": 2}
    assert made["metadata"] == {"a": "b", "kind": "picture"}
    assert f"{made['id']}  succeeded" in done.stderr
    spent = inside("costs", "--by", "recipe", cwd=home, **env).stdout
    assert re.search(r"imagine +0\.040000 +1 +0\b", spent), spent

    (home / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    done = inside("order", "upscale", "@a.png", cwd=home, **env)
    assert json.loads(done.stdout)["input"]["image_url"].startswith("data:image/png;base64,")


def test_model_command_prints_the_description_of_the_provider(
    world: tuple[Path, dict[str, str]],
) -> None:
    home, env = world
    for args in (["fal", "fal-ai/nano-banana"], ["eachlabs", "nano-banana"], ["oxen", "veo-3-1"]):
        shown = inside("model", *args, cwd=home, **env)
        assert "prompt" in json.dumps(json.loads(shown.stdout)), shown
    refused = inside("model", "eachlabs", "no-such-model", cwd=home, **env)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "eachlabs knows no such model" in refused.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("imagin", "x"), "there is no recipe 'imagin' (did you mean imagine?)"),
        (("imagine", "x", "--ratoi", "16:9"), "there is no option --ratoi (did you mean ratio?)"),
        (("imagine", "x", "--count", "9"), "This would be right: imagine x --count 4"),
        (("imagine", "x", "--person", "eve"), "you may not order here"),
        (("imagine", "x", "--key", "ü"), "--key must"),
        (("upscale", "@none.png"), "none.png"),
    ],
)
def test_refused_order_exits_1_with_the_reason(
    world: tuple[Path, dict[str, str]], args: tuple[str, ...], words: str
) -> None:
    home, env = world
    done = inside("order", *args, cwd=home, **env)
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr


def test_erase_empties_the_row_and_backup_copies_a_running_receiver(
    world: tuple[Path, dict[str, str]],
) -> None:
    home, env = world
    done = inside("submit", "fal", "fal-ai/nano-banana", "prompt=wax", "--wait", cwd=home, **env)
    prediction_id = json.loads(done.stdout)["id"]
    wait_until_delivered(prediction_id, home, env)
    erased = inside("erase", prediction_id, cwd=home, **env)
    assert erased.returncode == 0, erased.stderr
    prediction = json.loads(erased.stdout)
    assert (prediction["id"], prediction["input"]) == (prediction_id, {})
    assert prediction["erased_at"]
    backup = receiver("backup", "copy.db", cwd=home)
    assert backup.returncode == 0, backup.stderr
    assert backup.stdout.startswith("copy.db: ")
    assert "predictions, in" in backup.stdout
    again = inside("backup", "copy.db", cwd=home)
    assert (again.returncode, "--force" in again.stderr) == (1, True)


def test_backup_of_postgres_refers_to_pg_dump_without_the_password(tmp_path: Path) -> None:
    url = "postgresql://me:hush@db.example/receiver"
    done = inside("backup", "my copy", cwd=tmp_path, RECEIVER_DATABASE_URL=url)
    assert done.returncode == 1
    assert "pg_dump --format=custom --schema=receiver --file='my copy'" in done.stderr
    assert "hush" not in done.stderr


def test_rejected_submit_exits_1_with_the_error_code(
    world: tuple[Path, dict[str, str]],
) -> None:
    home, env = world
    done = inside("submit", "eachlabs", "nano-banana", "prompt=[refuse]", cwd=home, **env)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "rejected"


def test_dead_letter_is_listed_retried_and_replayed(world: tuple[Path, dict[str, str]]) -> None:
    home, env = world
    done = inside(
        "submit", "oxen", "nano-banana", "prompt=a fox", "--metadata", "dead=true", "--wait",
        cwd=home, **env,
    )  # fmt: skip
    prediction_id = json.loads(done.stdout)["id"]

    first = wait_until_dead(prediction_id, 1, home, env)
    assert first["reason"] == "on purpose"
    for name in (first["id"], first["event_id"]):
        assert show(name, home, env)["id"] == prediction_id
    assert inside("retry", first["id"], cwd=home, **env).returncode == 0
    assert wait_until_dead(prediction_id, 2, home, env)["id"] == first["id"]
    replayed = json.loads(inside("replay", prediction_id, cwd=home, **env).stdout)
    assert replayed["handlers"] == ["mine"]
    wait_until_dead(prediction_id, 3, home, env)
    canceled = inside("cancel", prediction_id, cwd=home, **env)
    assert (canceled.returncode, "already" in canceled.stderr) == (1, True)


@pytest.mark.parametrize(
    ("args", "words", "run_it"),
    [
        ("list", ["no receiver answers at http://127.0.0.1:1"], inside),
        ("submit fal m prompt", ["'prompt' is not NAME=VALUE"], inside),
        ("serve", ["RECEIVER_SECRET_KEY is missing"], inside),
        (
            "serve --dev nowhere.py no_such_module",
            ["nowhere.py: no such file", "no_such_module: cannot be loaded"],
            receiver,
        ),
    ],
)
def test_invalid_command_exits_1_with_a_message_and_no_traceback(
    tmp_path: Path, args: str, words: list[str], run_it: Callable[..., Any]
) -> None:
    done = run_it(*args.split(), cwd=tmp_path, RECEIVER_URL="http://127.0.0.1:1")
    assert done.returncode == 1
    assert [word for word in words if word not in done.stderr] == []
    assert "Traceback" not in done.stderr
    assert [*tmp_path.glob("*.db")] == []


def test_handler_module_and_package_in_the_working_folder_are_found(tmp_path: Path) -> None:
    for name, file in (("mine", "mine.py"), ("ours", "ours/__init__.py")):
        made = tmp_path / file
        made.parent.mkdir(exist_ok=True)
        made.write_text(f"from receiver import Event, on\n\n@on()\ndef {name}(event: Event): ...\n")
    done = from_scratch("drain", "--dev", "mine", "ours", cwd=tmp_path, PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr
    assert "mine:mine" in done.stderr
    assert "ours:ours" in done.stderr


def test_handler_file_with_the_name_of_an_installed_module_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "colorsys.py").touch()
    done = from_scratch("drain", "--dev", "colorsys", "svae", cwd=tmp_path, PYTHONSAFEPATH="1")
    assert (done.returncode, "colorsys.py is here" in done.stderr) == (1, True)
    assert "svae: cannot be loaded" in done.stderr
    assert "(did you mean save?)" in done.stderr


def test_misspelled_setting_and_provider_are_warned_about_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from receiver import Event, on\n\n"
        '@on(provider="fla", after="save")\ndef mine(event: Event): ...\n'
    )
    with running("serve", "--dev", "mine.py", cwd=tmp_path, RECEIVER_PUBLIC_ULR="x") as server:
        log = server.wait_for("receiver.started")
    assert "RECEIVER_PUBLIC_ULR is not a setting" in log
    assert "wants provider='fla', and there is none: it will never run (did you mean fal?)" in log


def test_syntax_error_in_a_handler_is_shown_with_line_and_caret(tmp_path: Path) -> None:
    (tmp_path / "syn.py").write_text("async def\n")
    done = receiver("drain", "--dev", "syn.py", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "receiver: syn.py:1:10: invalid syntax\n    async def\n             ^\n"
    )


def test_port_in_use_is_reported_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = receiver("serve", "--dev", "--port", port, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr == (
            f"receiver: port {port} of 127.0.0.1 is taken: stop what listens there, or give "
            "another by --port\n"
        )
        emulated = inside("emulate", "--port", port, cwd=tmp_path)
        assert (emulated.returncode, emulated.stdout, emulated.stderr) == (1, "", done.stderr)
    assert list(tmp_path.iterdir()) == []
    nowhere = inside("serve", "--dev", "--host", "nowhere.invalid", cwd=tmp_path)
    assert nowhere.returncode == 1
    assert "--host nowhere.invalid is not an address of this machine" in nowhere.stderr


@pytest.mark.parametrize(
    ("server", "client"),
    [
        ({"RECEIVER_API_KEY": "key"}, {"RECEIVER_API_KEYS": "key,two"}),
        ({"RECEIVER_API_KEYS": "key,two"}, {"RECEIVER_API_KEY": "two"}),
    ],
)
def test_server_and_client_accept_both_names_of_the_api_key_setting(
    tmp_path: Path, server: dict[str, str], client: dict[str, str]
) -> None:
    with running("serve", cwd=tmp_path, RECEIVER_SECRET_KEY=SECRET, **server) as process:
        process.wait_for("receiver.started")
        done = inside("list", cwd=tmp_path, RECEIVER_URL=process.url, **client)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("args", [("show", b"\xff"), ("submit", "fal", "m", b"prompt=\xe9")])
def test_argument_that_is_not_utf_8_exits_2(tmp_path: Path, args: tuple[str | bytes, ...]) -> None:
    done = from_scratch(*map(os.fsdecode, args), cwd=tmp_path)
    assert (done.returncode, "is not UTF-8" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    "args",
    [
        ("serve", "--port", "65536"),
        ("tail", "--after", "some"),
        ("emulate", "--shape", "other"),
        ("emulate", "--seconds", "-5"),
    ],
)
def test_invalid_option_value_exits_2(tmp_path: Path, args: tuple[str, ...]) -> None:
    done = inside(*args, cwd=tmp_path)
    assert (done.returncode, args[1] in done.stderr) == (2, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is full")
@pytest.mark.parametrize("args", ["settings", "settings --json", "--version", "--help"])
def test_output_to_a_full_disk_exits_1_with_a_message_and_no_traceback(args: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "receiver", *args.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr == "receiver: cannot write: No space left on device\n"


def test_version_option_prints_the_version(tmp_path: Path) -> None:
    assert from_scratch("--version", cwd=tmp_path).stdout == f"{version('prediction-receiver')}\n"


def test_dead_deliveries_are_replayed_in_bulk(world: tuple[Path, dict[str, str]]) -> None:
    home, env = world
    done = inside(
        "submit", "fal", "fal-ai/nano-banana", "prompt=x", "--wait",
        "--metadata", "dead=1", "--metadata", "bulk=1", cwd=home, **env,
    )  # fmt: skip
    prediction_id = json.loads(done.stdout)["id"]
    wait_until_dead(prediction_id, 1, home, env)
    which = ("--state", "dead", "--since", "1h", "--model", "fal-ai/*", "--metadata", "bulk=*")
    asked = inside("replay", *which, cwd=home, **env)
    assert (asked.returncode, asked.stderr) == (1, "receiver: this is not a terminal: pass --yes\n")
    done = inside("replay", *which, "--yes", cwd=home, **env)
    assert done.returncode == 0, done.stderr
    assert "1 deliveries of 1 events would be redelivered" in done.stdout
    assert done.stdout.endswith("done: 1 deliveries redelivered\n")
    replays = _lines(inside("replays", "--json", cwd=home, **env).stdout)
    assert [one["state"] for one in replays[:2]] == ["done", "canceled"]
    assert plain_cell(replays[1]["wanted"]).startswith("since=")
    assert show(prediction_id, home, env)["deliveries"][0]["replay_id"] == replays[0]["id"]


def test_show_prints_the_prediction_its_timeline_and_its_deliveries(
    world: tuple[Path, dict[str, str]],
) -> None:
    home, env = world
    uri = f"data:image/png;base64,{'QUJD' * 1000}"
    done = inside(
        "submit", "fal", "fal-ai/nano-banana", "prompt=a heron", f"image_url={uri}", "--wait",
        "--metadata", "dead=1", cwd=home, **env,
    )  # fmt: skip
    prediction = json.loads(done.stdout)
    wait_until_dead(prediction["id"], 1, home, env)
    text = inside("show", prediction["id"], cwd=home, **env).stdout
    for words in (
        f"{prediction['id']}  fal  fal-ai/nano-banana  succeeded\n",
        "input     prompt=a heron\n",
        "image_url=data:image/png;base64,… (4,022 characters: see --json)\n",
        f"output    {prediction['output'][0]['url']}\n",
        "dead  on purpose\n",
    ):
        assert words in text
    steps = ("created", "submitted", "succeeded  by", "mine #1", "deliveries")
    assert sorted(steps, key=text.index) == list(steps)


def test_unique_prefix_of_an_id_is_accepted(
    world: tuple[Path, dict[str, str]],
) -> None:
    home, env = world
    ids = []
    for _ in range(2):
        done = inside(
            "submit", "oxen", "m", "prompt=a fox", "--metadata", "dead=1", "--wait",
            cwd=home, **env,
        )  # fmt: skip
        ids.append(json.loads(done.stdout)["id"])
    part = ids[0][:19]
    for name in (part, f"evt_{part[5:]}", f"dlv_{part[5:]}", ids[0]):
        shown = json.loads(inside("show", name, "--json", cwd=home, **env).stdout)
        assert shown["id"] == ids[0]
    wait_until_dead(ids[0], 1, home, env)
    of_it = ("deliveries", "--prediction", part, "--state", "dead", "--json")
    [row] = _lines(inside(*of_it, cwd=home, **env).stdout)
    assert (row["prediction_id"], row["model"]) == (ids[0], "m")
    retried = json.loads(inside("retry", part, cwd=home, **env).stdout)
    assert retried["id"] == row["id"]
    several = inside("cancel", "pred_0", cwd=home, **env)
    assert (several.returncode, "give more digits" in several.stderr) == (1, True)
    none = inside("show", "pred_f", cwd=home, **env)
    assert (none.returncode, none.stderr) == (1, "receiver: no id begins with pred_f\n")
    wrong = inside("retry", part, "--handler", "unknown", cwd=home, **env)
    assert (wrong.returncode, "has no such delivery" in wrong.stderr) == (1, True)


@pytest.mark.parametrize("mode", [(), ("--sync",)])
def test_submit_with_wait_prints_id_each_status_and_output_url(
    world: tuple[Path, dict[str, str]], mode: tuple[str, ...]
) -> None:
    home, env = world
    submit = ("submit", "fal", "fal-ai/x", "prompt=a fox", "--wait", *mode)
    done = inside(*submit, cwd=home, **env)
    prediction = json.loads(done.stdout)
    *states, address = done.stderr.splitlines()
    assert address == prediction["output"][0]["url"]
    assert states[-1] == f"{prediction['id']}  succeeded"
    assert all(line.startswith(prediction["id"]) for line in states)
    whole = ["queued", "submitting", *(() if mode else ("processing",)), "succeeded"]
    printed = [line.split()[1] for line in states]
    assert printed == whole[-len(printed) :]  # no status is missed, however short


# The tests may run as a background job of a shell, whose processes ignore SIGINT.
_HEARS_INTERRUPTS: Final = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('receiver', run_name='__main__', alter_sys=True)"
)


def test_interrupted_wait_leaves_the_prediction_running(
    world: tuple[Path, dict[str, str]],
) -> None:
    home, env = world
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _HEARS_INTERRUPTS,
            "submit",
            "fal",
            "fal-ai/x",
            "prompt=[never] x",
            "--wait",
        ],
        cwd=home,
        env=environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    # The first line comes at once, although the prediction never ends.
    name, _ = process.stderr.readline().split()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (130, "")
    assert f"{name} goes on: `receiver show {name}` shows it" in err
    assert show(name, home, env)["status"] not in {"canceled", "failed"}


def test_wait_exits_1_when_the_receiver_stops(tmp_path: Path) -> None:
    with running("serve", "--emulate", cwd=tmp_path) as server:
        server.wait_for("receiver.started")
        command = ["-m", "receiver", "submit", "fal", "fal-ai/x", "prompt=[never] x", "--wait"]
        err = tmp_path / "err"
        env = environment({"RECEIVER_URL": server.url})
        process = Forked(command, tmp_path, env, tmp_path / "out", err)
        eventually(lambda: err.read_text().endswith("\n"))
        name, _ = err.read_text().split()
    assert process.wait(PATIENCE) == 1
    assert f"{name} goes on" in err.read_text()


def test_limited_list_reports_that_there_are_more(world: tuple[Path, dict[str, str]]) -> None:
    home, env = world
    for prompt in ("one", "two"):
        inside("submit", "fal", "fal-ai/nano-banana", f"prompt={prompt}", cwd=home, **env)
    some = inside("list", "--limit", "1", cwd=home, **env)
    assert "there are more" in some.stderr
    assert some.stdout.count("pred_") == 1


def test_rejected_callback_is_listed_by_discarded(world: tuple[Path, dict[str, str]]) -> None:
    home, env = world
    httpx.post(f"{env['RECEIVER_URL']}/webhooks/fal/guessed", content=b"{}")

    def listed() -> str:
        return inside("discarded", "--kind", "rejected", cwd=home, **env).stdout

    shown = eventually(listed, lambda text: "bad_token" in text)
    assert "127.0.0.1" in shown
    refused = inside("discarded", "--kind", "strange", "--json", cwd=home, **env)
    assert (refused.returncode, "kind must be one of" in refused.stderr) == (1, True)


def test_second_receiver_on_the_same_sqlite_file_exits_1_with_advice(tmp_path: Path) -> None:
    with running("serve", "--dev", cwd=tmp_path) as first:
        first.wait_for("receiver.started")
        second = receiver("serve", "--dev", "--port", str(free_port()), cwd=tmp_path)
    assert second.returncode == 1
    assert f"in use by another receiver (process {first.process.pid})" in second.stderr
    assert "RECEIVER_DATABASE_URL" in second.stderr


def test_missing_api_key_is_named_in_the_error(world: tuple[Path, dict[str, str]]) -> None:
    home, env = world
    done = inside("list", cwd=home, RECEIVER_URL=env["RECEIVER_URL"])
    assert done.returncode == 1
    assert "RECEIVER_API_KEY" in done.stderr


def test_url_with_the_v1_that_commands_add_is_named_in_the_error(
    world: tuple[Path, dict[str, str]],
) -> None:
    home, env = world
    done = inside("list", cwd=home, **env | {"RECEIVER_URL": f"{env['RECEIVER_URL']}/v1"})
    assert (done.returncode, "RECEIVER_URL must not end with /v1" in done.stderr) == (1, True)


def test_demo_runs_to_its_end_and_its_next_commands_work(tmp_path: Path) -> None:
    done = from_scratch("demo", "--folder", str(tmp_path), "--seconds", "0.1", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 13
    assert "14 signed events forwarded and verified" in done.stdout
    assert "4 proved by fal.ai's signature" in done.stdout
    assert "1 proved by a poll, as no callback came" in done.stdout
    assert "2 duplicates recorded, which changed nothing" in done.stdout
    assert "a forged callback was refused" in done.stdout
    assert "then by its picture" in " ".join(done.stdout.split())
    assert "Traceback" not in done.stderr
    # The next commands that the demo prints work.
    init, serve = re.findall(
        r"^  (.* init my-receiver|cd my-receiver && .*)$", done.stdout, re.MULTILINE
    )
    env = environment({})
    for command in (init, f"{serve} --help"):
        ran = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


def test_demo_runs_without_optional_dependencies(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules |= dict.fromkeys(('PIL', 'obstore', 'opentelemetry.sdk'));"
        "from receiver.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "demo", "--folder", str(tmp_path), "--seconds", "0.1"],
        cwd=tmp_path,
        env=environment({}),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 signed events forwarded and verified" in done.stdout
    assert "pip install 'prediction-receiver[storage]'" in done.stdout


def _printed(
    capsys: pytest.CaptureFixture[str], rows: list[dict[str, Any]], *names: str, wide: bool = False
) -> list[str]:
    print_table(rows, names, wide=wide)
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()


@pytest.mark.parametrize("width", [80, 97, 120, 200])
def test_table_row_fits_on_one_line_of_any_terminal_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    names = [f"pred_0653a1b2c3d4e{end}" + "0199f3a6d2c1e45b7f"[1:] for end in "123"]
    rows = [
        {"id": name, "model": "a/" * 30, "status": "dead", "why": "n\no 世界 " * 90, "none": None}
        for name in names
    ]
    head, *lines = _printed(capsys, rows, "id", "model", "status", "why", "none", "state")
    assert head.split() == ["id", "model", "status", "why"]
    assert len(lines) == len(rows)
    assert max(Text(line).cell_len for line in [head, *lines]) <= width
    parts = [line.split()[0] for line in lines]
    assert len(set(parts)) == len(rows)
    assert all(name.startswith(part) for name, part in zip(names, parts, strict=True))
    whole = _printed(capsys, rows, "id", "model", "status", "why", wide=True)
    assert len(whole) == 1 + len(rows)
    assert all(
        name in line and line.count("世界") == 90
        for name, line in zip(names, whole[1:], strict=True)
    )


def test_shortened_ids_in_a_table_stay_unique(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"dlv_{'06' * 16}{end}{'0' * 7}" for end in "12"]
    rows = [{"id": name, "reason": "no " * 40} for name in names]
    parts = [line.split()[0] for line in _printed(capsys, rows, "id", "reason")[1:]]
    assert parts == [name[: -len("0000000")] for name in names]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("2026-01-31T12:00:00.4Z", "0s"),
        ("2026-01-31T11:59:01Z", "59s"),
        ("2026-01-31T11:56:59.123456Z", "3m"),
        ("2026-01-31T10:00:00Z", "2h"),
        ("2025-01-31T12:00:00Z", "365d"),
        ("2026-01-31T12:03:00Z", "in 3m"),
        ("2026-13-31T12:03:00Z", "2026-13-31T12:03:00Z"),
        ("yesterday", "yesterday"),
    ],
)
def test_timestamp_is_shown_as_an_age(text: str, said: str) -> None:
    assert age(text, datetime(2026, 1, 31, 12, tzinfo=UTC)) == said


def test_provider_error_message_is_shown_unchanged() -> None:
    said = plain_cell({"code": "rejected", "message": "bad [/input] [red]"})
    assert said == "rejected: bad [/input] [red]"


@pytest.mark.parametrize(
    ("args", "env", "word"),
    [
        (("drain", "--dev"), {"SSL_CERT_FILE": "/nowhere.pem"}, "SSL_CERT_FILE: /nowhere.pem"),
        (("serve", "--dev"), {"ALL_PROXY": "socks4://127.0.0.1:1080"}, "ALL_PROXY: socks4"),
        (("demo",), {"SSLKEYLOGFILE": "/dev/null/log"}, "SSLKEYLOGFILE: cannot"),
        (("list",), {"SSL_CERT_FILE": "/nowhere.pem"}, "SSL_CERT_FILE: /nowhere.pem"),
        (("list",), {"RECEIVER_API_KEY": "schlüssel"}, "RECEIVER_API_KEY: must"),
        (("tail",), {"RECEIVER_URL": "receiver.example"}, "RECEIVER_URL: must"),
        (("demo", "--folder", "/dev/null/x"), {}, "/dev/null/x"),
        (("submit", "fal", "m", "size:=wide"), {}, "size:= must be JSON"),
        (("submit", "fal", "m", "--key", "ü"), {}, "--key must"),
        (("submit", "fal", "m", "--key", ""), {}, "--key must"),
    ],
)
def test_invalid_environment_or_argument_is_named_without_traceback(
    tmp_path: Path, args: tuple[str, ...], env: dict[str, str], word: str
) -> None:
    done = (receiver if args[0] == "drain" else inside)(*args, cwd=tmp_path, **env)
    assert done.returncode == 1
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert "schlüssel" not in done.stderr


def test_local_receiver_is_reached_despite_proxy_settings_and_crlf(
    world: tuple[Path, dict[str, str]],
) -> None:
    home, env = world
    done = inside(
        "list", "--json", cwd=home,
        RECEIVER_URL=env["RECEIVER_URL"].removeprefix("http://") + "/\r",
        RECEIVER_API_KEY="'key'\r\n",
        ALL_PROXY="socks://127.0.0.1:1/", http_proxy="127.0.0.1:1", NO_PROXY="fd00::/8,[::1]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_prompt_stays_text_and_large_number_keeps_its_digits(
    world: tuple[Path, dict[str, str]],
) -> None:
    home, env = world
    seed = 123456789012345678901234567890
    done = inside(
        "submit", "fal", "fal-ai/x", "prompt=1984", "negative_prompt=null", "num_images=2",
        f"seed={seed}", "flag=true", "name=a=b", 'size:={"width":1}', 'word:="7"',
        "--metadata", "commit=123e4", "--metadata", "count:=3", cwd=home, **env,
    )  # fmt: skip
    prediction = json.loads(done.stdout)
    assert prediction["input"] == {
        "prompt": "1984",
        "negative_prompt": "null",
        "num_images": 2,
        "seed": seed,
        "flag": True,
        "name": "a=b",
        "size": {"width": 1},
        "word": "7",
    }
    assert prediction["metadata"] == {"commit": "123e4", "count": 3}


def test_local_file_is_sent_as_a_data_uri(world: tuple[Path, dict[str, str]]) -> None:
    home, env = world
    (home / "a b.png").write_bytes(b"png")
    submit = ("submit", "fal", "fal-ai/x")
    done = inside(*submit, "image_url=@a b.png", "user=@@ada", "prompt=@ada waves", cwd=home, **env)
    assert json.loads(done.stdout)["input"] == {
        "image_url": "data:image/png;base64,cG5n",
        "user": "@ada",
        "prompt": "@ada waves",
    }
    (home / "large.png").write_bytes(bytes(3_000_001))
    (home / "what").touch()
    for name, words in (
        ("large.png", "receiver: large.png is larger than 3,000,000 bytes: put it where the"),
        ("none.png", "none.png cannot be read: No such file or directory\n"),
        ("what", "what: its name shows no type\n"),
    ):
        refused = inside(*submit, f"image_url=@{name}", cwd=home, **env)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert words in refused.stderr


def test_list_and_events_filter_by_model_metadata_and_time(
    world: tuple[Path, dict[str, str]],
) -> None:
    home, env = world
    models = ("lists/one", "lists/two", "lists/three")
    names = {}
    for model in models:
        done = inside(
            "submit", "oxen", model, "prompt=x", "--wait", "--metadata", f"of={model[-1]}",
            "--metadata", "n:=7", cwd=home, **env,
        )  # fmt: skip
        names[model] = json.loads(done.stdout)["id"]

    def listed(*args: str) -> list[str]:
        done = inside(*args, "--json", cwd=home, **env)
        assert done.returncode == 0, done.stderr
        return [row["model"] for row in _lines(done.stdout)]

    assert listed("list", "--model", "lists/*") == [*reversed(models)]
    assert listed("list", "--model", "lists/t*", "--metadata", "of=[oe]") == [models[2], models[1]]
    assert listed("list", "--metadata", "n=7", "--since", "1h", "--all") == [*reversed(models)]
    assert listed("list", "--metadata", "n=7", "--since", "2999-01-01T00:00:00Z") == []
    assert len(listed("list", "--all")) >= len(models)
    some = inside("list", "--model", "lists/*", "--limit", "2", cwd=home, **env)
    assert (some.stdout.count("lists/"), "there are more" in some.stderr) == (2, True)
    wrong = inside("list", "--since", "soon", cwd=home, **env)
    assert (wrong.returncode, "'soon' is not a time" in wrong.stderr) == (1, True)
    done = inside("events", "--metadata", "n=7", "--type", "succeeded", cwd=home, **env)
    assert done.returncode == 0, done.stderr
    head, *lines = done.stdout.splitlines()
    assert head.split()[:4] == ["id", "provider", "model", "status"]
    assert [line.split()[:4] for line in lines] == [
        [f"evt_{names[model][5:]}", "oxen", model, "succeeded"] for model in reversed(models)
    ]
    [event] = _lines(inside("events", "--limit", "1", "--json", cwd=home, **env).stdout)
    assert event["type"] == "prediction.succeeded"


@pytest.mark.parametrize(("answer", "erased"), [("n", False), ("y", True), (None, True)])
def test_erase_asks_for_confirmation_on_a_terminal(
    world: tuple[Path, dict[str, str]], answer: str | None, erased: bool
) -> None:
    home, env = world
    done = inside("submit", "oxen", "m", "prompt=x", "--wait", cwd=home, **env)
    name = json.loads(done.stdout)["id"]
    wait_until_delivered(name, home, env)
    given, terminal = pty.openpty()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "receiver", "erase", name, *([] if answer else ["--yes"])],
            cwd=home,
            env=environment(env),
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.PIPE,
        )
        if answer:
            os.write(given, f"{answer}\n".encode())
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        os.close(given)
        os.close(terminal)
    assert process.returncode == int(not erased)
    assert ("will be gone for ever" in err.decode()) == (answer is not None)
    assert (show(name, home, env)["input"] == {}) == erased


# --- in the process of the tests ---


def run(*args: str, **env: str) -> Result:
    return invoke(*args, **{"COLUMNS": "400", **env})


HELPED = sorted(command.name or command.callback.__name__ for command in main.registered_commands)  # type: ignore[union-attr] # each has one


@pytest.mark.parametrize("name", HELPED)
def test_help_contains_every_word_of_docstring_and_option_texts(name: str) -> None:
    [command] = [
        command
        for command in main.registered_commands
        if name in {command.name, getattr(command.callback, "__name__", None)}
    ]
    written = inspect.getdoc(command.callback) or ""
    options = inspect.signature(command.callback or run, eval_str=True).parameters.values()
    for option in options:
        [about] = option.annotation.__metadata__
        written += f" {about.help or ''}"
    name = name.removesuffix("_")
    shown = re.sub(r"[│\s]+", " ", run(name, "--help").output)
    assert [word for word in written.replace("`", "").split() if word not in shown] == []


def test_every_command_is_in_a_help_panel_and_panels_are_in_order() -> None:
    shown = run("--help").output
    assert re.findall(r"─ (\w+) ─", shown) == ["Options", *PANELS]
    assert set(PANELS) >= {command.rich_help_panel for command in main.registered_commands}


@pytest.mark.parametrize("width", [80, 120])
def test_emulate_help_lists_all_prompt_keywords(width: int) -> None:
    shown = run("emulate", "--help", COLUMNS=str(width)).output
    words = re.findall(r"^ +(\[\w+\]) ", emulator.__doc__ or "", re.MULTILINE)
    assert len(words) > 6
    assert [word for word in [*words, "[lose_callback]"] if word not in shown] == []
    assert max(map(len, shown.splitlines())) <= width


def test_shell_completes_a_command_name(tmp_path: Path) -> None:
    asked = {"_RECEIVER_COMPLETE": "complete_bash", "COMP_WORDS": "receiver em", "COMP_CWORD": "1"}
    done = subprocess.run(
        [Path(sys.executable).parent / "receiver"],
        cwd=tmp_path,
        env=environment(asked),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stdout.split() == ["emulate"], done.stderr


def test_emulate_prints_exports_for_a_receiver_and_its_chats(tmp_path: Path) -> None:
    with running("emulate", cwd=tmp_path) as server:
        shown = server.wait_for("# the words for prompts", "# chat: receiver chat --emulator")
    lines = re.findall(r"^export (.*)$", shown, re.MULTILINE)
    exported = dict(shlex.split(line)[0].split("=", 1) for line in lines)  # as a shell reads it
    assert exported["RECEIVER_PUBLIC_URL"] == "http://127.0.0.1:8000"
    assert settings_for(server.url).items() <= exported.items()
    assert {
        *("SLACK_URL", "SLACK_SIGNING_SECRET", "SLACK_TOKEN"),
        *("DISCORD_URL", "DISCORD_PUBLIC_KEY", "DISCORD_APPLICATION", "DISCORD_TOKEN"),
        *("TELEGRAM_URL", "TELEGRAM_TOKEN"),
    } <= exported.keys()


def test_emulate_ends_event_streams_cleanly_on_shutdown(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with running("emulate", cwd=tmp_path) as server:
            server.wait_for("# the words for prompts")
            key = {"authorization": "Bearer k"}
            answer = stack.enter_context(
                httpx.stream("GET", f"{server.url}/oxen/api/events", headers=key)
            )
        assert answer.read() == b""  # a clean end, not a broken connection
    assert '"level":"error"' not in server.said()


HOSTILE: Final = "\x1b]0;owned\x07\x9b31m\u202eevil\u200b\x7f\nreceiver: forged [red]x[/red]"


@pytest.fixture(scope="module")
def hostile() -> Iterator[str]:
    """Serve a fake receiver that puts terminal escapes into every text."""
    names = (
        "id handler reason kind source channel prediction_id state name provider model status "
        "because wanted delivery type prediction"
    )
    row: dict[str, Any] = dict.fromkeys(names.split(), HOSTILE)
    row |= {"error": {"code": HOSTILE, "message": HOSTILE}, "delivery": None, "held": HOSTILE}
    answers = {"data": [row], "handlers": [{**row, "runs": True, "after": [HOSTILE]}], **row}
    answers["assumed"] = True
    event = {"prediction": {**row, "output": [{"url": HOSTILE}]}, "channel": HOSTILE}
    attempt = {"prediction": row, "delivery": {**row, "due_at": HOSTILE}, "time": "0001-01-01"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            streams = "/stream" in self.path
            refuses = "/refused" in self.path
            frames = {"prediction.failed": event, "delivery.dead": attempt}
            body = "".join(
                f"id: 1\nevent: {name}\ndata: {json.dumps(data)}\n\n"
                for name, data in frames.items()
            )
            lists = (
                {"data": [{**row, "prediction": row}]} if "/v1/events?" in self.path else answers
            )
            text = body if streams else json.dumps({"detail": HOSTILE} if refuses else lists)
            self.send_response(422 if refuses else 200)
            self.send_header("Content-Type", "text/event-stream" if streams else "application/json")
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET  # noqa: N815 - its name there

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


_SHOWN: Final = (
    *("list", "deliveries", "handlers", "discarded", "replays", "explain x", "show x"),
    *("events", "list --all --model *"),
    *("tail --count 2", "tail --count 2 --json", "list --json", "pause x", "show refused"),
)
_IN_COLOUR: Final = ("list", "handlers", "explain x", "show x", "tail --count 2", "list --json")
"""One command for each way of printing, as each sets its colours in one place."""


@pytest.mark.parametrize(
    ("line", "colour"), [*((line, "") for line in _SHOWN), *((line, "1") for line in _IN_COLOUR)]
)
def test_text_from_a_hostile_server_cannot_inject_terminal_escapes(
    hostile: str, line: str, colour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if colour:
        monkeypatch.setenv("FORCE_COLOR", "1")
    ran = run(*line.split(), RECEIVER_URL=hostile)
    assert ran.exit_code == int("refused" in line), ran.output
    shown = re.sub(r"\x1b\[[0-9;]*m", "", ran.output) if colour else ran.output  # our own colours
    assert "evil" in shown
    assert [char for char in shown if not char.isprintable() and char != "\n"] == []
    assert not any(text.startswith("receiver: forged") for text in shown.splitlines())
    if "json" in line:
        assert HOSTILE in _texts_of(_lines(shown))


def _texts_of(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _texts_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts_of(inner)
    elif isinstance(value, str):
        yield value
