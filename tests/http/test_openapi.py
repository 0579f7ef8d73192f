"""The document at /openapi.json matches the routes, answers, errors and examples of the app."""

from __future__ import annotations

import ast
import base64
import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jsonschema_rs
import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.routing import Route

from receiver import Call, Door, Event, Reply, Unproved, create_app, on, route
from receiver.emulator import create_emulator, settings_for
from receiver.http.connection import protocol
from receiver.http.problems import PROBLEMS
from receiver.http.routes.predictions import REFUSALS
from receiver.http.webhooks import LATER
from receiver.settings import Settings
from tests.conftest import Start
from tests.emulator.serving import FAST, serve
from tests.openapi import FILES, FOLDER
from tests.patience import PATIENCE
from tests.receiving import API_KEY, ENV, Json, Station, write

TOP = Path(__file__).parent.parent.parent
MADE: Json = msgspec.json.decode((FOLDER / "openapi.json").read_bytes())
ROWS = [
    (path, method, row)
    for path, methods in MADE["paths"].items()
    for method, row in methods.items()
]


def fits(value: Any, schema: Json) -> bool:
    """Return whether a value matches a schema of the document."""
    whole = {**schema, "components": MADE["components"]}
    return jsonschema_rs.Draft202012Validator(whole, validate_formats=True).is_valid(value)


def settings(folder: Path, **more: str) -> Settings:
    return Settings.read({**ENV, "RECEIVER_DATABASE_URL": f"sqlite:///{folder / 'r.db'}", **more})


# --- the document ---


@pytest.mark.parametrize("name", FILES)
def test_packaged_files_match_the_declared_routes(name: str) -> None:
    assert (FOLDER / name).read_bytes() == FILES[name](), "run `make docs`"


def test_document_is_valid_openapi_3_1() -> None:
    OpenAPIV31SpecValidator(MADE).validate()
    names = [row["operationId"] for _, _, row in ROWS]
    assert len(set(names)) == len(names)


def test_links_use_parameters_of_their_target_operations() -> None:
    wanted = {row["operationId"]: {p["name"] for p in row["parameters"]} for _, _, row in ROWS}
    answers = [answer for _, _, row in ROWS for answer in row["responses"].values()]
    links = [link for answer in answers for link in answer.get("links", {}).values()]
    assert links
    for link in links:
        assert link["parameters"].keys() <= wanted[link["operationId"]]


def test_documented_routes_are_the_routes_of_the_app(tmp_path: Path) -> None:
    routes = {
        (method, route.path.replace(":path", ""))
        for route in create_app(settings(tmp_path)).routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
        if method == "POST" or not route.path.startswith("/in/")  # each plugin has its own methods
    }
    assert {(method.upper(), path) for path, method, _ in ROWS} == routes


def test_every_tag_and_every_route_is_described() -> None:
    assert [tag["name"] for tag in MADE["tags"] if not tag.get("description")] == []
    assert [path for path, _, row in ROWS if not row.get("description")] == []


def examples() -> Iterator[tuple[str, Any, Json]]:
    """Yield the name, value and schema of every example."""
    rows = [row for _, _, row in ROWS] + [one["post"] for one in MADE["webhooks"].values()]
    for row in rows:
        for given in row["parameters"]:
            if "example" in given:
                yield given["name"], given["example"], given["schema"]
        for part in (row.get("requestBody", {}), *row["responses"].values()):
            for content in part.get("content", {}).values():
                for name, example in content.get("examples", {}).items():
                    yield f"{row['operationId']}-{name}", example["value"], content["schema"]


def test_every_example_matches_its_schema() -> None:
    found = list(examples())
    assert len(found) > 50
    assert [name for name, example, schema in found if not fits(example, schema)] == []


def test_schemas_of_answers_have_required_fields_and_descriptions() -> None:
    delivery = MADE["components"]["schemas"]["Delivery"]
    assert set(delivery["required"]) == set(delivery["properties"])
    stored = MADE["components"]["schemas"]["Stored"]["properties"]
    assert stored["sha256"]["description"] == "Hex digest of the content."
    prediction = MADE["components"]["schemas"]["Prediction"]["properties"]
    assert prediction["created_at"]["format"] == "date-time"


# --- problems ---

_MAKERS = {"Problem", "_raw_problem", "_raw_wait", "problem_body"}


def raised() -> set[tuple[int, str]]:
    """Return status and type of all problems in the source code."""
    found = set()
    files = (TOP / "receiver").rglob("*.py")
    # The emulator answers with the problems of its providers, the dashboard with pages.
    texts = [path.read_text() for path in files if not {"emulator", "dashboard"} & {*path.parts}]
    for text in texts:
        for node in ast.walk(ast.parse(text)) if "roblem" in text else ():
            match node:
                case ast.Call(
                    func=ast.Name(id=name),
                    args=[ast.Constant(value=int(status)), ast.Constant(value=str(kind)), *_],
                ) if name in _MAKERS:
                    found.add((status, kind))
    return found


def test_every_problem_type_is_documented_with_its_status() -> None:
    described = {(status, kind) for kind, (status, _) in PROBLEMS.items()}
    others = {(405, "method-not-allowed"), *((503, kind) for kind in LATER.values())}
    others |= {refusal[:2] for refusal in REFUSALS.values()}
    assert described == raised() | others


def test_every_documented_problem_type_belongs_to_a_route() -> None:
    answered = set(re.findall(r"urn:receiver:problem:([a-z-]+)", json.dumps(MADE)))
    assert answered | {"method-not-allowed"} == PROBLEMS.keys()


# --- routes of the documentation ---


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "kind"), [("/openapi.json", "application/json"), ("/docs", "text/html; charset=utf-8")]
)
async def test_openapi_and_docs_need_no_key_and_are_cached_by_etag(
    start: Start, path: str, kind: str
) -> None:
    async with start() as station:
        answer = await station.world.get(path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        assert "max-age" in answer.headers["cache-control"]
        tag = answer.headers["etag"]
        for known, status in (
            (tag, 304),
            (f'"other", W/{tag}', 304),
            ("*", 304),
            (f'"{tag}"', 200),
            ('"other"', 200),
            ("\x7f", 200),
        ):
            again = await station.world.get(path, headers={"if-none-match": known})
            assert (again.status_code, bool(again.content)) == (status, status == 200), known
            assert again.headers["etag"] == tag


@pytest.mark.anyio
async def test_root_page_links_to_existing_pages(start: Start) -> None:
    async with start() as station:
        answer = await station.world.get("/")
        named = re.findall(r"^(\S+)  +", answer.text, re.MULTILINE)
        for path in named:
            assert (await station.world.get(f"/{path}")).is_success, path
    assert answer.text.startswith("A prediction receiver: ")
    assert named == ["docs", "openapi.json", "health"]


@pytest.mark.anyio
async def test_docs_page_shows_all_operations_and_loads_nothing_external(start: Start) -> None:
    async with start() as station:
        answer = await station.world.get("/docs")
        served = (await station.world.get("/openapi.json")).json()
        assert served == MADE | {"servers": [{"url": "https://hooks.test"}]}
    text = answer.text
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    for tag in ("style", "script"):
        [own] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert text.count("<script") == 1
    assert not re.search(r"<link|<img|style=|src=|url\(|@import| on\w+=", text)
    places = set(re.findall(r' id="([^"]+)"', text))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= places
    assert {row["operationId"] for _, _, row in ROWS} <= places
    assert {*MADE["components"]["schemas"]} <= places
    assert set(re.findall(r'href="([^#][^"]*)"', text)) == {"openapi.json"}
    assert len(answer.content) < 120_000


# --- the app matches the document ---


@pytest.mark.anyio
async def test_callback_answers_match_the_document(start: Start) -> None:
    said = MADE["paths"]["/webhooks/{provider}/{token}"]["post"]["responses"]["200"]
    async with start() as station:
        letter = write(station.network, await station.submitted("fal"))
        for word in ("accepted", "duplicate"):
            answer = await station.post(letter)
            assert answer.json() == {"status": word}
            assert fits(answer.json(), said["content"]["application/json"]["schema"])


@on("*", name="tests.handles")
def handles(_: Event) -> None: ...


NAMES_OF_NOTHING: Final = ("x", "%00", "%FF", "x%0A", "a" * 9999)
WRONG: Final[tuple[Json, ...]] = (
    {"headers": {"content-type": "text/xml", "content-encoding": "br"}, "content": b"<"},
    {"headers": {"content-type": "application/json"}, "content": b"{"},
    {"headers": {"idempotency-key": b"\xe9", "last-event-id": "x"}, "content": b""},
)


@pytest.mark.anyio
async def test_unauthenticated_request_returns_401_even_if_malformed(start: Start) -> None:
    @route("told", proof=refuse)
    async def told(_: Call, __: Door) -> Reply:
        return Reply()

    guarded = [row for row in ROWS if "401" in row[2]["responses"]]
    async with start(told, RECEIVER_LIMIT_UNPROVED_PER_MINUTE="1000000") as station:
        for path, method, _ in guarded:
            named = path.replace("{provider}/{token}", "fal/{token}").replace(
                "/in/{name}", "/in/told"
            )
            for name, query, wrong in itertools.product(
                NAMES_OF_NOTHING, ("", "?seconds=0&limit=x&x=1&x=2"), WRONG
            ):
                asked = re.sub(r"\{\w+\}", name, named)
                if "handlers/x%0A/" in asked or asked.endswith("%0A"):
                    continue  # no route has this path
                answer = await station.world.request(method, asked + query, **wrong)
                assert answer.status_code == 401, (method, asked, query, wrong)


def refuse(_: Call) -> None:
    raise Unproved("always")


@pytest.mark.anyio
async def test_answers_about_ended_predictions_match_the_document(start: Start) -> None:
    """A run of schemathesis rarely gets these answers."""

    async def check(station: Station, method: str, path: str, described: str) -> Json:
        answer = await station.http.request(method, path)
        said = MADE["paths"][described][method.lower()]["responses"][str(answer.status_code)]
        assert fits(answer.json(), said["content"]["application/json"]["schema"]), answer.text
        return dict(answer.json())

    one = "/v1/predictions/{id}"
    async with start(handles) as station:
        sent = await station.submitted("eachlabs")
        await station.push(sent)
        await check(station, "POST", "/v1/drain", "/v1/drain")
        path = one.format(id=sent.prediction_id)
        for method, tail in (("GET", ""), ("GET", "/explain"), ("POST", "/replay")):
            await check(station, method, path + tail, one + tail)
        page = await check(station, "GET", "/v1/deliveries", "/v1/deliveries")
        assert page["data"][0]["history"][0]["result"] == "done"


EACH_PROVIDERS_OWN: Final = """
[[operations]]
include-name = "POST /v1/predictions"
checks.positive_data_acceptance.expected-statuses = \
    ["2xx", "3xx", "401", "403", "404", "409", "422", "429", "5xx"]
"""
"""Each provider has its own rules for model names, which are in no schema: hence 422."""


@pytest.mark.timeout(300)  # 7 s on an idle machine
def test_schemathesis_finds_no_errors(tmp_path: Path) -> None:
    """Schemathesis generates requests from nothing but the document.

    It reads a file, because it would skip the route from which it loads the document.
    """
    (tmp_path / "openapi.json").write_text(json.dumps(MADE))
    (tmp_path / "schemathesis.toml").write_text(EACH_PROVIDERS_OWN)
    env = {
        "RECEIVER_PUBLIC_URL": "",
        "RECEIVER_POLL_AFTER": "0.05",
        "EACHLABS_REQUESTS_PER_MINUTE": "none",
    }
    with serve(create_emulator(FAST)) as emulated:
        env |= settings_for(f"http://127.0.0.1:{emulated}")
        app = create_app(settings(tmp_path, **env), [handles])
        with serve(app, http=protocol()) as port:
            ran = subprocess.run(
                [
                    Path(sys.executable).with_name("schemathesis"),
                    *("run", "openapi.json", "--url", f"http://127.0.0.1:{port}", "--no-color"),
                    *("--header", f"Authorization: Bearer {API_KEY}"),
                    *("--checks", "all", "--phases", "examples,coverage,fuzzing,stateful"),
                    *("--max-examples", "2", "--generation-deterministic"),
                    *("--exclude-path", "/v1/events/stream"),  # a stream never ends
                ],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=4 * PATIENCE,
                check=False,
            )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"Tested: {len(ROWS) - 1}" in ran.stdout, ran.stdout
