"""`serve` for development: emulated providers, the .env file, and the reload of handlers."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import httpx

from receiver.emulator.providers import CALLING
from receiver.providers import DECLARED
from tests.cli.running import SECRET, Running, inside, receiver, running
from tests.journey.parts import eventually
from tests.loopback import free_port

HANDLER = """\
import time
from pathlib import Path

from receiver import Event, Reply, Unproved, on, route

from words import WORD


def refuse(_):
    raise Unproved


@route("shop", proof=refuse)
async def shop(call, door):
    return Reply.empty()


@on("*", name="mine")
def mine(event: Event) -> None:
    with Path("seen").open("a") as file:
        file.write(f"begun {WORD} {event.prediction.id}\\n")
    while not Path("go").exists():
        time.sleep(0.02)
    with Path("seen").open("a") as file:
        file.write(f"done {WORD} {event.prediction.id}\\n")
"""


def lines(server: Running, event: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in server.said().splitlines() if line.startswith("{")]
    return [line for line in found if line["event"] == event]


def write(folder: Path, word: str = "one") -> None:
    (folder / "mine.py").write_text(HANDLER)
    (folder / "words.py").write_text(f'WORD = "{word}"\n')


def wait_until_begun(folder: Path, server: Running) -> None:
    """Wait until the handler runs."""

    def has_begun() -> bool:
        assert server.process.poll() is None, server.said()
        return (folder / "seen").exists()

    eventually(has_begun)


def test_serve_emulate_runs_a_handler_for_every_provider_without_settings(
    tmp_path: Path,
) -> None:
    write(tmp_path)
    (tmp_path / "go").touch()
    with running(
        "serve", "--emulate", "--try", "mine.py", cwd=tmp_path, FAL_QUEUE_URL="http://[::1]:1"
    ) as server:
        server.wait_for('"event":"handler.attempt"', times=len(DECLARED))
        said = server.said()
        listed = inside("list", "--json", cwd=tmp_path, RECEIVER_URL=server.url)
        found = [json.loads(line) for line in listed.stdout.splitlines()]
        [command] = re.findall(r"  Try +RECEIVER_URL=\S+ .* submit (.*)\n", said)
        assert command == 'oxen nano-banana prompt="a lighthouse" --wait'
        args = [word.replace('"', "") for word in re.findall(r'(?:[^" ]|"[^"]*")+', command)]
        tried = inside("submit", *args, cwd=tmp_path, RECEIVER_URL=server.url)
    assert {one["provider"]: one["channel"] for one in found} == {
        **dict.fromkeys(CALLING, "webhook"),
        "oxen": "sse",
    }
    assert (tried.returncode, json.loads(tried.stdout)["status"]) == (0, "succeeded")
    banner = re.findall(r"^  (Ways in|\w+) +(.*)$", said, re.MULTILINE)
    names = ["API", "Dashboard", "Callbacks", "Handlers", "Ways in", "Chat", "Try"]
    assert [name for name, _ in banner] == names
    assert dict(banner)["Ways in"] == "/in/shop"
    assert dict(banner)["API"] == f"{server.url}/v1, docs at {server.url}/docs"
    assert dict(banner)["Callbacks"] == f"on: emulated providers call {server.url}"
    assert dict(banner)["Handlers"] == "mine, reloaded when a file changes"
    # Emulated predictions have a database of their own.
    assert sorted(file.name for file in tmp_path.glob("*.db")) == ["receiver.emulated.db"]


def test_reload_runs_new_code_keeps_old_code_on_error_and_loses_no_attempt(tmp_path: Path) -> None:
    write(tmp_path)
    with running("serve", "--emulate", "mine.py", cwd=tmp_path) as server:
        server.wait_for("  Try ")
        first = submitted(tmp_path, server)
        wait_until_begun(tmp_path, server)
        (tmp_path / "words.py").write_text("WORD = \n")
        log = server.wait_for("handlers.kept")
        assert r"words.py:1:8: invalid syntax\n    WORD =\n           ^" in log
        write(tmp_path, "two")
        server.wait_for("handlers.reloaded")
        second = submitted(tmp_path, server)
        (tmp_path / "go").touch()
        server.wait_for('"event":"handler.attempt"', times=2)
        attempts = {line["prediction"]: line for line in lines(server, "handler.attempt")}
    seen = (tmp_path / "seen").read_text().splitlines()
    assert [line for line in seen if first in line] == [f"begun one {first}", f"done one {first}"]
    assert [line for line in seen if second in line] == [
        f"begun two {second}",
        f"done two {second}",
    ]
    assert {(one["attempt"], one["state"]) for one in attempts.values()} == {(1, "done")}


def submitted(folder: Path, server: Running) -> str:
    done = inside(
        "submit", "fal", "fal-ai/x", "prompt=[fast]", "--wait", cwd=folder, RECEIVER_URL=server.url
    )
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["id"])


def test_reload_registers_new_and_removes_old_handlers(tmp_path: Path) -> None:
    write(tmp_path)
    with running("serve", "--emulate", "mine.py", cwd=tmp_path) as server:
        server.wait_for("  Try ")
        first = submitted(tmp_path, server)
        wait_until_begun(tmp_path, server)
        (tmp_path / "mine.py").write_text(HANDLER.replace('name="mine"', 'name="other"'))
        server.wait_for("handlers.reloaded")
        handlers = inside("handlers", "--json", cwd=tmp_path, RECEIVER_URL=server.url)
        (tmp_path / "go").touch()
        prediction = submitted(tmp_path, server)
        server.wait_for('"event":"handler.attempt"', times=2)
        attempts = lines(server, "handler.attempt")
    rows = [json.loads(line) for line in handlers.stdout.splitlines()]
    assert [row["name"] for row in rows if row["registered"]] == ["other"]
    assert {(one["handler"], one["prediction"], one["state"]) for one in attempts} == {
        ("mine", first, "done"),  # it was running when its handler was removed
        ("other", prediction, "done"),
    }


def test_dev_mode_reads_env_file_and_environment_takes_precedence(
    tmp_path: Path,
) -> None:
    write(tmp_path)
    file = tmp_path / ".env"
    file.write_text("RECEIVER_HANDLERS=mine.py\nRECEIVER_API_KEYS=of-the-file\nFAL_KEY='k'\n")
    file.chmod(0o644)
    with running("serve", "--dev", cwd=tmp_path, RECEIVER_PUBLIC_URL="http://[::1]:1") as server:
        said = server.wait_for("chmod 600 .env")
        answer = httpx.get(
            f"{server.url}/v1/handlers",
            headers={"authorization": "Bearer of-the-file"},
            verify=False,
        )
        assert inside("list", cwd=tmp_path, RECEIVER_URL=server.url).returncode == 0
    assert [row["name"] for row in answer.json()["data"]] == ["mine"]
    assert "on: providers call http://[::1]:1\n" in said
    with running("serve", "--dev", cwd=tmp_path, RECEIVER_HANDLERS="log") as server:
        assert "  Handlers  log, reloaded" in server.wait_for("  Try ")
    file.chmod(0o646)
    refused = receiver("serve", "--dev", cwd=tmp_path)
    assert (refused.returncode, ".env can be written by everyone" in refused.stderr) == (1, True)
    assert stat.S_IMODE(file.stat().st_mode) == 0o646


def test_client_reads_url_and_key_from_env_file_but_never_mixes_sources(
    tmp_path: Path,
) -> None:
    write(tmp_path)
    file = tmp_path / ".env"
    keys = {"RECEIVER_SECRET_KEY": SECRET, "RECEIVER_API_KEYS": "of-the-file"}
    with running("serve", "mine.py", cwd=tmp_path, **keys) as server:
        server.wait_for("receiver.started")
        file.write_text(f"RECEIVER_URL={server.url}\nRECEIVER_API_KEY=of-the-file\n")
        asked = receiver("handlers", "--json", cwd=tmp_path)
        assert json.loads(asked.stdout)["name"] == "mine", asked.stderr
        elsewhere = f"http://127.0.0.1:{free_port()}"
        asked = receiver("handlers", cwd=tmp_path, RECEIVER_URL=elsewhere)
        assert f"no receiver answers at {elsewhere}" in asked.stderr
        asked = receiver("handlers", cwd=tmp_path, RECEIVER_API_KEY="of-the-environment")
        assert (asked.returncode, server.url in asked.stderr) == (1, False)
        assert server.said().count('"route":"/v1/handlers"') == 1


def test_env_file_is_ignored_without_dev_mode(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"RECEIVER_SECRET_KEY={'s' * 32}\n")
    done = receiver("serve", cwd=tmp_path)
    assert (done.returncode, "RECEIVER_SECRET_KEY is missing" in done.stderr) == (1, True)
    tried = receiver("serve", "--try", cwd=tmp_path)
    assert (tried.returncode, "--try goes with" in tried.stderr) == (2, True)


def test_recipes_prices_and_triggers_reload_and_invalid_toml_keeps_the_old(
    tmp_path: Path,
) -> None:
    recipe = '[{}]\nprovider = "fal"\nmodel = "fal-ai/x"\ninput = {{ prompt = "[fast]" }}\n'
    trigger = '[{}]\nproof = "bearer"\nsecret = "KEY"\nkey = "{{n}}"\nrecipe = "{}"\n'
    allow = '[[allow]]\nplace = "*"\n'
    files = {name: tmp_path / name for name in ("recipes.toml", "triggers.toml", "prices.toml")}
    files["recipes.toml"].write_text(recipe.format("imagine") + allow)
    files["triggers.toml"].write_text(trigger.format("drawn", "imagine"))
    files["prices.toml"].write_text('["fal/*"]\ncall = 0.25\n')
    named = {f"RECEIVER_{name}": f"{name.lower()}.toml" for name in ("RECIPES", "PRICES")}
    secret = "k" * 32
    with running(
        "serve",
        "--emulate",
        "trigger-in",
        cwd=tmp_path,
        **named,
        TRIGGERS="triggers.toml",
        KEY=secret,
    ) as server:
        server.wait_for("  Try ")

        def call(trigger: str) -> int:
            headers = {"authorization": f"Bearer {secret}"}
            answer = httpx.post(
                f"{server.url}/in/trigger/{trigger}", json={"n": 1}, headers=headers, verify=False
            )
            return answer.status_code

        files["recipes.toml"].write_text(recipe.format("paint") + "[[allow]\n")
        assert "recipes.toml:5:8: not TOML: " in server.wait_for("handlers.kept")
        assert call("drawn") == 202
        files["triggers.toml"].write_text(trigger.format("painted", "paint"))
        files["prices.toml"].write_text('["fal/*"]\ncall = 0.5\n')
        files["recipes.toml"].write_text(recipe.format("paint") + allow)
        server.wait_for('"recipes":["paint"]')
        assert (call("painted"), call("drawn")) == (202, 401)
        done = inside("order", "paint", "--wait", cwd=tmp_path, RECEIVER_URL=server.url)
    assert json.loads(done.stdout)["cost"]["amount"] == 0.5
