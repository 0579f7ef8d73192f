"""The workflows in `deploy/automation/` are complete, and the receiver accepts their requests."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml  # type: ignore[import-untyped] # its stubs are not installed

from receiver.testing import Kit, make_event
from tests.conftest import Start
from tests.handlers.parts import HANDLERS, OK, built_in, serving
from tests.http.test_server import served
from tests.patience import PATIENCE
from tests.receiving import API_KEY, Network, eventually

pytestmark = pytest.mark.anyio

DEPLOY: Final = HANDLERS.parent / "deploy"
FOLDER: Final = DEPLOY / "automation"
PAGE: Final = (DEPLOY / "automation.md").read_text()
SECRET: Final = 'it\'s a "secret" of the $workflows'
FILES: Final = dict(re.findall(r"(?ms)^```toml\n# (\w+\.toml)\n(.*?)^```$", PAGE))
HOSTS: Final = "https://receiver.example"


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the page's two files, with a trigger `actions` too; return the path of the recipes."""
    section = FILES["triggers.toml"].partition("[n8n]\n")[2].partition("\n[")[0]
    triggers = f"[n8n]\n{section}\n[actions]\n{section}"
    for name, text in {**FILES, "triggers.toml": triggers}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("TRIGGERS", str(tmp_path / "triggers.toml"))
    monkeypatch.setenv("RECEIVER_RECIPES", str(tmp_path / "recipes.toml"))
    monkeypatch.setenv("N8N_SECRET", SECRET)
    return str(tmp_path / "recipes.toml")


# --- GitHub Actions ---


def steps() -> dict[str, dict[str, Any]]:
    workflow = yaml.safe_load((FOLDER / "picture.yml").read_text())
    return {step["name"]: step for step in workflow["jobs"]["picture"]["steps"] if "name" in step}


async def step(name: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a step as GitHub's runner does: with bash, which stops at the first failing command."""
    named = set(steps()[name].get("env", {})) - set(env)
    assert not named, f"{name} needs {named}"
    return await asyncio.to_thread(
        subprocess.run,
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", steps()[name]["run"]],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "GITHUB_OUTPUT": str(folder / "output"), **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


async def test_github_job_orders_once_and_waits_for_the_picture(
    start: Start, network: Network, ready: str, tmp_path: Path
) -> None:
    async with (
        start(built_in("trigger_in"), RECEIVER_RECIPES=ready) as station,
        served(station) as port,
    ):
        run_of = {"RECEIVER_URL": f"http://127.0.0.1:{port}", "GITHUB_RUN_ID": "17"}
        signed = {**run_of, "ACTIONS_SECRET": SECRET, "PROMPT": 'a "lighthouse"\n\\ é'}
        for _ in range(2):
            ran = await step("Order", tmp_path, **signed)
            assert ran.returncode == 0, ran.stderr
        first, again = (tmp_path / "output").read_text().splitlines()
        assert first == again
        assert station.count("predictions") == 1
        found = await station.read(first.removeprefix("id="))
        assert found["input"] == {"prompt": signed["PROMPT"]}
        await eventually(lambda: network.sent)
        assert (await station.push(network.sent[0])).is_success
        asked = {**run_of, "RECEIVER_API_KEY": API_KEY, "ID": found["id"]}
        ran = await step("Wait", tmp_path, **asked)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.strip().startswith("https://")
        refused = await step("Order", tmp_path, **{**signed, "ACTIONS_SECRET": "another one of 16"})
        assert refused.returncode == 22
        assert station.count("predictions") == 1


async def test_github_job_fails_if_the_prediction_fails(
    start: Start, ready: str, tmp_path: Path
) -> None:
    async with start(RECEIVER_RECIPES=ready) as station, served(station) as port:
        sent = await station.submitted("fal")
        await station.push(sent, ok=False)
        asked = {"RECEIVER_API_KEY": API_KEY, "ID": (await last(station.http))}
        ran = await step("Wait", tmp_path, RECEIVER_URL=f"http://127.0.0.1:{port}", **asked)
        assert (ran.returncode, json.loads(ran.stdout)["code"]) == (1, "timeout")


async def last(http: httpx.AsyncClient) -> str:
    return str((await http.get("/v1/predictions")).json()["data"][0]["id"])


# --- n8n ---


def nodes(file: str) -> dict[str, dict[str, Any]]:
    workflow = json.loads((FOLDER / file).read_text())
    return {node["name"]: node for node in workflow["nodes"]}


@pytest.mark.parametrize("file", ["order-and-be-told.json", "trigger.json"])
def test_n8n_workflow_is_complete_and_documented(file: str) -> None:
    workflow, known = json.loads((FOLDER / file).read_text()), nodes(file)
    assert len(known) == len({node["id"] for node in workflow["nodes"]}) == len(workflow["nodes"])
    assert {*workflow["connections"]} <= {*known}
    outputs = [output for each in workflow["connections"].values() for output in each["main"]]
    led_to = {to["node"] for output in outputs for to in output}
    begins = {name for name, node in known.items() if re.search("webhook|Trigger$", node["type"])}
    assert led_to | begins | {"Read me"} == set(known)
    note = known["Read me"]["parameters"]["content"]
    assert "not run in n8n" in note
    for named in re.findall(r"\*([A-Z].+?)\*", note):
        assert named in known
    assert f"automation/{file}" in PAGE


def evaluated(text: str, found: dict[str, Any]) -> str:
    """Replace the expressions in a parameter by their values, as n8n does."""

    def value(match: re.Match[str]) -> str:
        return str(found[match[1]])

    assert text.startswith("=")
    return re.sub(r"\{\{ (.+?) \}\}", value, text[1:])


async def test_signed_request_of_the_n8n_workflow_is_accepted(start: Start, ready: str) -> None:
    known = nodes("trigger.json")
    signing, sending = known["Signature"]["parameters"], known["Trigger"]["parameters"]
    async with start(built_in("trigger_in"), RECEIVER_RECIPES=ready) as station:
        body = '{"id":"231","prompt":"a lighthouse, Monday"}'
        found = {"$json.body": body, "$json.time": str(int(station.clock()))}
        (algorithm, encoding) = (signing["type"].lower(), signing["encoding"])
        ran = await asyncio.to_thread(
            subprocess.run,
            ["openssl", "dgst", f"-{algorithm}", "-hmac", SECRET],
            input=evaluated(signing["value"], found).encode(),
            capture_output=True,
            check=True,
        )
        assert encoding == "hex"
        found[f"$json.{signing['dataPropertyName']}"] = ran.stdout.decode().split()[-1]
        headers = {
            each["name"]: evaluated(each["value"], found)
            for each in sending["headerParameters"]["parameters"]
        }
        answer = await station.world.request(
            sending["method"],
            sending["url"].removeprefix(HOSTS),
            content=evaluated(sending["body"], found),
            headers={**headers, "content-type": sending["rawContentType"]},
        )
        assert answer.status_code == 202, answer.text
        assert (await station.read(answer.json()["id"]))["input"]["prompt"].endswith("Monday")


async def test_order_of_the_n8n_workflow_is_accepted(start: Start, ready: str) -> None:
    sending = nodes("order-and-be-told.json")["Order"]["parameters"]
    (key,) = sending["headerParameters"]["parameters"]
    options, metadata = {"prompt": "a lighthouse"}, {"n8n": "231"}
    assert "{ options: { prompt: 'a lighthouse' }, metadata: { n8n: $" in sending["jsonBody"]
    async with start(RECEIVER_RECIPES=ready) as station:
        answer = await station.http.request(
            sending["method"],
            sending["url"].removeprefix(HOSTS),
            json={"options": options, "metadata": metadata},
            headers={key["name"]: evaluated(key["value"], {"$execution.id": "231"})},
        )
        assert answer.status_code == 202, answer.text
        assert (await station.read(answer.json()["id"]))["metadata"] == metadata


def test_forwarded_event_matches_the_n8n_workflow(
    receiver_kit: Callable[..., Kit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The secret is made as the workflow's note says, and the signature as its node does."""
    text = "0123456789abcdef0123456789abcdef"
    made = subprocess.run(
        ["bash", "-c", f"echo whsec_$(printf %s {text} | base64)"], capture_output=True, check=True
    )
    known = nodes("order-and-be-told.json")
    said = known["Read me"]["parameters"]["content"]
    assert 'whsec_$(printf %s "that text" | base64)' in said
    with serving(OK) as server:
        monkeypatch.setenv("FORWARD_SECRET", made.stdout.decode().strip())
        monkeypatch.setenv("FORWARD_URL", server.url)
        kit = receiver_kit(built_in("forward"), online=True)
        kit.deliver(make_event(output=["https://cdn.example/a.png"], metadata={"n8n": "231"}))
    (asked,) = server.asked
    signing = known["Expected signature"]["parameters"]
    found = {"$json.raw": asked.body.decode()}
    found |= {f"$json.headers['{name}']": value for name, value in asked.headers.items()}
    signed = evaluated(signing["value"], found).encode()
    digest = hmac.digest(text.encode(), signed, signing["type"].lower())
    assert signing["encoding"] == "base64"
    expected = f"v1,{base64.b64encode(digest).decode()}"
    assert expected in asked.headers["webhook-signature"].split(" ")
    body = json.loads(asked.body)
    conditions = known["Proved, and a success"]["parameters"]["conditions"]["conditions"]
    assert body["type"] == conditions[-1]["rightValue"]
    for each in known["Picture"]["parameters"]["assignments"]["assignments"]:
        value: Any = {"body": body}
        steps = re.findall(r"\w+", each["value"].removeprefix("={{ $json"))
        for step in steps:
            value = value[int(step) if step.isdigit() else step]
        assert value in {"https://cdn.example/a.png", "231"}
