"""`trigger-in`: proofs, idempotent orders, rejected calls, and mistakes in the triggers file."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from receiver import Call, Unproved
from receiver.deliveries.importing import load
from receiver.deliveries.loading import load_file
from receiver.model.errors import HandlerError
from tests.conftest import Start
from tests.handlers.parts import HANDLERS, built_in
from tests.patience import PATIENCE
from tests.receiving import Clock, Network, Station, eventually

pytestmark = pytest.mark.anyio

STANDARD: Final = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
GITHUB: Final = "It's a Secret to Everybody"
PLAIN: Final = "a-secret-of-the-shop-0123456789"
BEARER: Final = "a-key-for-the-timer-0123456789"
SECRETS: Final = {
    "STANDARD_SECRET": STANDARD,
    "OLD_SECRET": "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
    "GITHUB_SECRET": GITHUB,
    "SHOP_SECRET": PLAIN,
    "TIMER_SECRET": BEARER,
}
RECIPES: Final = """
[imagine]
provider = "fal"
model = "fal-ai/nano-banana"
input = { prompt = "{prompt}", num_images = "{count}", raw = "{raw}" }

[imagine.options.prompt]
required = true
longest = 500

[imagine.options.count]
kind = "integer"
most = 4

[imagine.options.raw]
kind = "boolean"

[rare]
provider = "fal"
model = "fal-ai/nano-banana"
input = { prompt = "the same" }

[[limits]]
by = "recipe"
per = "day"
count = 100

[[allow]]
place = "trigger:*"

[[allow]]
person = "github:octo*"
place = "github"
"""
TRIGGERS: Final = """
[webhook]
proof = "standard"
secret = ["STANDARD_SECRET", "OLD_SECRET"]
recipe = "imagine"
options = { prompt = "{data.prompt}", count = "{data.count}", raw = "{data.raw}" }
metadata = { kind = "hook", order = "{data.order}", "n" = 3 }

[issues]
proof = "github"
secret = "GITHUB_SECRET"
recipe = "imagine"
person = "github:{sender.login}"
place = "github"
options = { prompt = "{issue.title}: {issue.body}" }

[issues.when]
action = ["labeled", "opened"]
label.name = "draw*"
"header:x-github-event" = "issues"

[shop]
proof = "hmac"
secret = "SHOP_SECRET"
header = "X-Shop-Signature"
algorithm = "sha512"
prefix = "v0="
encoding = "base64"
timestamp = "X-Shop-Time"
signed = "v0:{header:x-shop-time}:{body}"
key = "{items.0.id}"
recipe = "imagine"
options = { prompt = "{{{wish}}}" }

[timer]
proof = "bearer"
secret = "TIMER_SECRET"
key = "{header:ce-source}/{header:ce-id}"
recipe = "imagine"
options = { prompt = "{prompt}" }

[timer.when]
"header:x-off" = "no*"

[rare]
proof = "bearer"
secret = "TIMER_SECRET"
key = "{header:idempotency-key}"
recipe = "rare"
"""
TIMER: Final = {"authorization": f"Bearer {BEARER}"}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """Return a function that writes both files and returns the settings that name them."""

    def write(triggers: str = TRIGGERS, recipes: str = RECIPES) -> dict[str, str]:
        named = {"RECEIVER_RECIPES": "recipes.toml", "TRIGGERS": "triggers.toml"}
        for (name, file), text in zip(named.items(), (recipes, triggers), strict=True):
            (tmp_path / file).write_text(text)
            named[name] = str(tmp_path / file)
        for name, value in {**SECRETS, **named}.items():
            monkeypatch.setenv(name, value)
        return named

    return write


Files = Callable[..., dict[str, str]]
Prove = Callable[[Call], None]


def standard(
    body: bytes, key: str = "msg_1", at: float | None = None, **more: str
) -> dict[str, str]:
    """Sign with the official library."""
    when = datetime.now(UTC) if at is None else datetime.fromtimestamp(int(at), UTC)
    return {
        "webhook-id": key,
        "webhook-timestamp": str(int(when.timestamp())),
        "webhook-signature": Webhook(STANDARD).sign(key, when, body.decode()),
        **more,
    }


def github(body: bytes, delivery: str = "72d3162e", event: str = "issues") -> dict[str, str]:
    return {
        "x-hub-signature-256": "sha256=" + hmac.new(GITHUB.encode(), body, sha256).hexdigest(),
        "x-github-delivery": delivery,
        "x-github-event": event,
        "content-type": "application/json",
    }


def shop(body: bytes, at: float) -> dict[str, str]:
    signed = f"v0:{int(at)}:".encode() + body
    digest = base64.b64encode(hmac.digest(PLAIN.encode(), signed, "sha512")).decode()
    return {"x-shop-time": str(int(at)), "x-shop-signature": f"v0={digest}"}


def body_of(prompt: Any = "a lighthouse", **data: Any) -> bytes:
    return json.dumps({"type": "order", "data": {"prompt": prompt, **data}}).encode()


def issue(action: str = "labeled", label: str = "draw it", login: str = "octocat") -> bytes:
    said = {"issue": {"title": "a lighthouse", "body": None}, "label": {"name": label}}
    return json.dumps({"action": action, **said, "sender": {"login": login}}).encode()


async def call(
    station: Station, name: str, body: bytes, headers: dict[str, str], **more: str
) -> httpx.Response:
    return await station.world.post(
        f"/in/trigger/{name}", content=body, headers={**headers, **more}
    )


def type_of(answer: httpx.Response) -> str:
    return str(answer.json()["type"]).rpartition(":")[2]


@pytest.fixture
def serve(start: Start, files: Files) -> Callable[..., Any]:
    def serve(triggers: str = TRIGGERS, recipes: str = RECIPES, **env: Any) -> Any:
        named = files(triggers, recipes)
        return start(built_in("trigger_in"), RECEIVER_RECIPES=named["RECEIVER_RECIPES"], **env)

    return serve


Serve = Callable[..., Any]


# --- duplicates ---


@pytest.mark.both_engines
async def test_duplicate_calls_order_once_even_a_day_later(serve: Serve, network: Network) -> None:
    body = body_of()
    async with serve() as station:
        answers = await asyncio.gather(
            *(call(station, "webhook", body, standard(body)) for _ in range(4))
        )
        assert {answer.status_code for answer in answers} == {202}, answers[0].text
        first = answers[0].json()
        assert first["status"] in {"queued", "submitting", "processing"}
        await eventually(lambda: network.count("fal.submit") == 1)
    tomorrow = Clock()
    tomorrow.ahead = 86_400.0
    # The body and the triggers file differ; only the key identifies a duplicate.
    async with serve(TRIGGERS.replace('"hook"', '"other"'), clock=tomorrow) as station:
        again = body_of("another")
        answer = await call(station, "webhook", again, standard(again, at=tomorrow()))
        assert [answer.json()["id"]] == [*{answer.json()["id"] for answer in answers}]
        assert station.count("predictions") == 1
        assert network.count("fal.submit") == 1
        other = await call(station, "webhook", again, standard(again, "msg_2", tomorrow()))
        assert other.json()["id"] != first["id"]


async def test_same_key_at_two_triggers_gives_two_orders(serve: Serve) -> None:
    headers = {**TIMER, "ce-source": "x", "ce-id": "1", "x-off": "no", "idempotency-key": "x/1"}
    async with serve() as station:
        answers = [
            await call(station, name, b'{"prompt": "a"}', headers) for name in ("timer", "rare")
        ]
        assert [answer.status_code for answer in answers] == [202, 202]
        assert station.count("predictions") == 2


# --- orders ---


async def test_values_keep_their_type_and_missing_ones_are_omitted(serve: Serve) -> None:
    async with serve() as station:
        body = body_of(count=3, raw=False, order=42)
        answer = await call(station, "webhook", body, standard(body))
        found = await station.read(answer.json()["id"])
        assert found["input"] == {"prompt": "a lighthouse", "num_images": 3, "raw": False}
        assert found["metadata"] == {"kind": "hook", "order": 42, "n": 3}
        who = {"person": "trigger:webhook", "place": "trigger:webhook", "via": "in/trigger"}
        assert found["order"] == {"recipe": "imagine", **who}
        body = body_of(count=None)
        answer = await call(station, "webhook", body, standard(body, "msg_2"))
        found = await station.read(answer.json()["id"])
        assert found["input"] == {"prompt": "a lighthouse"}
        assert found["metadata"] == {"kind": "hook", "n": 3}


async def test_github_sender_must_be_allowed_and_other_events_are_ignored(
    serve: Serve,
) -> None:
    async with serve() as station:
        body = issue()
        answer = await call(station, "issues", body, github(body))
        found = await station.read(answer.json()["id"])
        assert found["input"]["prompt"] == "a lighthouse: "
        assert (found["order"]["person"], found["order"]["place"]) == ("github:octocat", "github")
        form = urlencode({"payload": body.decode()}).encode()
        as_form = {"content-type": "application/x-www-form-urlencoded"}
        again = await call(station, "issues", form, {**github(form), **as_form})
        assert again.json()["id"] == found["id"]
        as_curl_says = await call(station, "issues", body, {**github(body), **as_form})
        assert as_curl_says.json()["id"] == found["id"]
        no_form = await call(station, "issues", b"a;b", {**github(b"a;b"), **as_form})
        assert no_form.status_code == 400
        stranger = issue(login="mallory")
        refused = await call(station, "issues", stranger, github(stranger, "2"))
        assert (refused.status_code, type_of(refused)) == (403, "not-allowed")
        for body, headers in (
            (b'{"zen": "Design for failure."}', {"event": "ping"}),
            (issue("closed"), {}),
            (issue(label="bug"), {}),
            (issue(), {"event": "pull_request"}),
            (b"[]", {}),
        ):
            answer = await call(station, "issues", body, github(body, "3", **headers))
            assert (answer.status_code, answer.json()) == (200, {"status": "ignored"})
        assert station.count("predictions") == 1


async def test_both_cloudevents_modes_give_one_order_and_malformed_events_get_400(
    serve: Serve,
) -> None:
    attributes = {"specversion": "1.0", "id": "é 1", "source": "/shop", "type": "wish"}
    data = {"prompt": "a lighthouse"}
    packed = base64.b64encode(json.dumps(data).encode()).decode()
    structured = {
        **TIMER,
        "x-off": "no",
        "content-type": "application/cloudevents+json; charset=utf-8",
    }
    binary = {f"ce-{name}": quote(value) for name, value in attributes.items()}
    async with serve() as station:
        for content, headers in (
            ({**attributes, "data": data}, {**structured, "ce-id": "forged"}),
            ({**attributes, "data_base64": packed}, structured),
            (data, {**TIMER, "x-off": "none", **binary}),
        ):
            answer = await call(station, "timer", json.dumps(content).encode(), headers)
            assert answer.status_code == 202, answer.text
        assert station.count("predictions") == 1
        odd: list[Any] = [{**attributes, "id": ""}, {**attributes, "specversion": "0.3"}, [], {}]
        for content in odd:
            answer = await call(station, "timer", json.dumps(content).encode(), structured)
            assert answer.status_code == 400
        bad = json.dumps({**attributes, "data_base64": "?"}).encode()
        assert (await call(station, "timer", bad, structured)).status_code == 400
        batch = {**structured, "content-type": "application/cloudevents-batch+json"}
        assert (await call(station, "timer", b"[]", batch)).status_code == 400


# --- proofs ---


@pytest.fixture
def prove(files: Files) -> Prove:
    """Return the proof function alone, so that a vector can be checked at its own time."""
    files()
    load([built_in("trigger_in")])
    return load_file(HANDLERS / "trigger_in.py").prove  # type: ignore[no-any-return]


def test_official_signature_test_vectors_are_accepted(prove: Prove) -> None:
    """They are from the libraries of Standard Webhooks and from GitHub's documentation."""
    signature = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": f"v1,{'A' * 43}= v2,x v1a,y {signature}",
    }
    body = b'{"test": 2432232314}'
    call = Call(rest="webhook", body=body, at=1614265330, headers=headers)
    prove(call)
    for late in (-301, 301):
        with pytest.raises(Unproved, match="stale"):
            prove(replace(call, at=call.at + late))
    digest = "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    for sent in (digest, digest.upper()):
        headers = {"x-hub-signature-256": f"sha256={sent}"}
        prove(Call(rest="issues", body=b"Hello, World!", headers=headers))


async def test_forged_stale_or_unknown_calls_get_401_and_order_nothing(
    serve: Serve,
) -> None:
    body, now = body_of(), Clock()()
    wish = json.dumps({"wish": "x", "items": [{"id": 1}]}).encode()
    then = datetime.fromtimestamp(int(now), UTC)
    old = Webhook(SECRETS["OLD_SECRET"]).sign("msg_1", then, body.decode())
    bad: list[tuple[str, bytes, dict[str, str]]] = [
        ("webhook", body, {}),
        ("webhook", body, standard(body_of("another"))),
        ("webhook", body, standard(body, at=now - 3000)),
        ("webhook", body, standard(body, at=now + 3000)),
        ("webhook", body, {**standard(body), "webhook-id": "msg_2"}),
        ("webhook", body, {**standard(body), "webhook-timestamp": f"{now:.0f}.5"}),
        ("webhook", body, {**standard(body), "webhook-signature": "v1,"}),
        ("webhook", body, {**standard(body), "webhook-signature": "v1a,\u00e9 x v1,\u00e9"}),
        ("issues", body, {**github(body), "x-hub-signature-256": "sha256=" + "0" * 64}),
        ("issues", body, {**github(body), "x-hub-signature-256": "sha256="}),
        ("shop", wish, {**shop(wish, now), "x-shop-time": str(int(now) + 1)}),
        ("shop", wish, shop(wish, now - 3000)),
        ("timer", b"{}", {"authorization": BEARER}),
        ("timer", b"{}", {"authorization": "Bearer "}),
        ("timer", b"{}", {"authorization": f"Bearer {BEARER}\u00e9"}),
        ("timer", b"{}", {"authorization": f"Basic {BEARER}"}),
        ("timers", b"{}", TIMER),
        ("timer/x", b"{}", TIMER),
        ("", b"{}", TIMER),
    ]
    async with serve() as station:
        for name, content, headers in bad:
            latin = {key: value.encode("latin-1") for key, value in headers.items()}
            answer = await station.world.post(f"/in/trigger/{name}", content=content, headers=latin)
            assert answer.status_code == 401, (name, headers)
            assert answer.json()["detail"] == "this call could not be proved"
        assert station.count("predictions") == 0
        for name, content, headers in (
            ("webhook", body, {**standard(body, at=now), "webhook-signature": f"v1,x {old}"}),
            ("shop", wish, shop(wish, now - 5)),
        ):
            good = await call(station, name, content, headers)
            assert good.status_code == 202, good.text
        prompts = {prompt for (prompt,) in station.rows("SELECT input FROM predictions")}
        # In a template, a double brace stands for one brace.
        assert any('"{x}"' in prompt for prompt in prompts)


# --- proved calls that are rejected ---


UNFIT: Final[list[tuple[bytes, str]]] = [
    (b"", "prompt is missing"),
    (b"{", "not JSON"),
    (b"\xff", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"data": ' * 400 + b"1" + b"}" * 400, "prompt is missing"),
    (b"[]", "prompt is missing"),
    (b"null", "prompt is missing"),
    (b'"data"', "prompt is missing"),
    (body_of(None), "prompt is missing"),
    (body_of({"a": 1}), "data.prompt must be a text"),
    (body_of(17), "prompt must be a text"),
    (body_of("x" * 501), "at most 500 characters"),
    (body_of(count="many"), "count must be a whole number"),
    (body_of(count=9), "count must be 4 or less"),
    (body_of(raw=1), "raw must be yes or no"),
    (body_of(order=["x"]), "data.order must be a text"),
    (body_of(order="x" * 300_000), "metadata has at most"),
]


async def test_signed_malformed_body_gets_400_or_422(serve: Serve) -> None:
    async with serve() as station:
        for body, says in UNFIT:
            answer = await call(station, "webhook", body, standard_of(body))
            assert answer.status_code in {400, 422}, body[:80]
            assert says in answer.json()["detail"]
        assert station.count("predictions") == 0
        marked = b"\xef\xbb\xbf" + body_of("a lighthouse")
        coded = {**standard_of(marked), "content-encoding": "gzip"}
        assert (await call(station, "webhook", marked, coded)).status_code == 415
        assert (await call(station, "webhook", marked, standard_of(marked))).status_code == 202


def standard_of(body: bytes) -> dict[str, str]:
    """Sign a body of any bytes; the library accepts only text."""
    if body.isascii():
        return standard(body)
    signed = f"msg_1.{int(Clock()())}.".encode() + body
    key = base64.b64decode(STANDARD.removeprefix("whsec_"))
    digest = base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
    return {**standard(b""), "webhook-signature": f"v1,{digest}"}


async def test_missing_key_or_invalid_person_gets_400_and_oversized_body_413(
    serve: Serve,
) -> None:
    async with serve() as station:
        on = {**TIMER, "x-off": "no"}
        for name, body, headers in (
            ("timer", b'{"prompt": "x"}', on),
            ("timer", b'{"prompt": "x"}', {**on, "ce-id": "1"}),
            ("timer", b'{"prompt": "x"}', {**on, "ce-id": "%00", "ce-source": "x"}),
            ("webhook", body_of(), standard(body_of(), "")),
            ("issues", issue(login=""), github(issue(login=""))),
            ("issues", issue(login="x" * 200), github(issue(login="x" * 200))),
            ("issues", issue(login="a\nb"), github(issue(login="a\nb"))),
        ):
            answer = await call(station, name, body, headers)
            assert (answer.status_code, type_of(answer)) == (400, "invalid-body"), name
        titleless = json.dumps({**json.loads(issue()), "issue": {"body": "x"}}).encode()
        answer = await call(station, "issues", titleless, github(titleless))
        assert answer.json()["detail"] == "issue.title is missing"
        answer = await call(station, "rare", b"x" * 1_000_001, TIMER)
        assert answer.status_code == 413
        assert station.count("predictions") == 0


async def test_order_over_the_limit_gets_429_with_retry_after(serve: Serve) -> None:
    scarce = RECIPES.replace("count = 100", "count = 1")
    async with serve(recipes=scarce) as station:
        first, again, over = [
            await call(station, "rare", b"", {**TIMER, "idempotency-key": key})
            for key in ("1", "1", "2")
        ]
        assert first.json()["id"] == again.json()["id"]
        assert (over.status_code, type_of(over)) == (429, "over-limit")
        assert int(over.headers["retry-after"]) > 0


# --- random calls ---

NAMES: Final = st.sampled_from(["webhook", "issues", "shop", "timer", "rare", "none", ""])
STARTS: Final = ("v1,", "sha256=", "v0=", "Bearer ", "1764000000", "application/cloudevents+json")
LATIN: Final = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f")
)
HEADERS: Final = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        (
            *("webhook-id", "webhook-timestamp", "webhook-signature", "x-hub-signature-256"),
            *("x-shop-signature", "x-shop-time", "authorization", "content-type", "ce-id"),
        ),
        st.tuples(st.sampled_from(STARTS), LATIN).map("".join) | LATIN,
    ),
)
VALUES: Final = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside),
    max_leaves=8,
)


async def test_random_unsigned_calls_are_rejected_and_signed_ones_cause_no_500(
    serve: Serve,
) -> None:
    async with serve() as station:
        loop = asyncio.get_running_loop()

        def ask(name: str, body: bytes, headers: dict[str, bytes]) -> int:
            request = station.world.post(f"/in/trigger/{name}", content=body, headers=headers)
            answer = asyncio.run_coroutine_threadsafe(request, loop).result(PATIENCE)
            return int(answer.status_code)

        @given(NAMES, st.binary() | VALUES.map(encoded), HEADERS)
        def strangers(name: str, body: bytes, headers: dict[str, str]) -> None:
            latin = {key: value.encode("latin-1") for key, value in headers.items()}
            assert ask(name, body, latin) in {401, 404, 429}

        @given(VALUES, VALUES, st.sampled_from(["", "application/cloudevents+json"]))
        @example("a", None, "")
        def senders(prompt: Any, order: Any, kind: str) -> None:
            body = encoded({"data": {"prompt": prompt, "order": order}})
            headers = {**standard_of(body), "content-type": kind}
            latin = {key: value.encode("latin-1") for key, value in headers.items()}
            # All of these calls have the same key, so only the first valid one orders.
            status = ask("webhook", body, latin)
            assert status in {202, 400, 422}
            assert status == 202 or (prompt, order, kind) != ("a", None, "")

        await asyncio.to_thread(strangers)
        assert station.count("predictions") == 0
        await eventually(lambda: station.http.get("/v1/discarded?kind=rejected"), has_data)
        await asyncio.to_thread(senders)
        assert station.count("predictions") == 1


def has_data(answer: httpx.Response) -> bool:
    return {item["provider"] for item in answer.json()["data"]} == {"/in/trigger"}


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


# --- mistakes in the triggers file ---

BAD: Final = """
[Webhook]
proof = "standart"
secret = "STANDARD_SECRET"
recipe = "imagin"

[bare]
recipe = "imagine"
options = { promt = "x" }

[open]
proof = "github"
secret = "THERE_IS_NONE"
recipe = "imagine"
options = { prompt = "{issue..title} {" }
person = "mallory"
place = "elsewhere"

[told]
proof = "bearer"
secret = "s3cret!value"
recipe = "imagine"
key = "always"
options = { prompt = ["x"] }
when = { a = [], b = 1979-05-27 }

[late]
proof = "hmac"
secret = ["SHOP_SECRET", "SHORT_SECRET"]
header = "no header"
timestamp = "x-time"
signed = "{body}"
algoritm = "sha1"
recipe = "rare"
options = { prompt = "x" }
place = ""
"""
TOLD: Final = """
[Webhook]: a name is of small letters, digits, - and _, 64 at most
[Webhook]: proof must be one of standard, github, hmac, bearer (did you mean standard?)
[Webhook]: recipe must be one of imagine, rare (did you mean imagine?)
[bare]: proof is missing
[bare]: secret is missing
[bare.options]: promt: there is no such key (did you mean prompt?)
[bare.options]: prompt is missing, and imagine needs it
needs THERE_IS_NONE as the secret that calls of the trigger open are proved by
[open.options]: prompt has
[open]: the recipes allow nobody here: add [[allow]] with place = "elsewhere"
[told]: secret must be the name of an environment variable
[told]: key must differ from order to order
[told.options]: prompt must be a text in quotes
[told]: when a must be a pattern
SHORT_SECRET must have 16 characters or more
[late.options]: prompt: there is no such key
[late]: key is missing: what is the same when a call is repeated
[late]: header must be the name of a header
[late]: place must not be empty
[late]: signed must have {header:x-time}
[late]: algoritm: there is no such key (did you mean algorithm?)
"""


def test_all_mistakes_in_the_triggers_file_are_reported_without_secrets(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(BAD)
    monkeypatch.setenv("SHORT_SECRET", "hunter2")
    with pytest.raises(HandlerError) as caught:
        load([built_in("trigger_in")])
    said = str(caught.value)
    for line in TOLD.strip().splitlines():
        assert line in said, f"{line}\n---\n{said}"
    assert "s3cret" not in said
    assert "hunter2" not in said


@pytest.mark.parametrize(
    ("triggers", "says"),
    [
        ("", "declares nothing"),
        ("x = 1", "x must be a table"),
        ("[", r"triggers\.toml:1:2: not TOML: "),
    ],
)
def test_triggers_file_without_triggers_is_rejected(files: Files, triggers: str, says: str) -> None:
    files(triggers)
    with pytest.raises(HandlerError, match=says):
        load([built_in("trigger_in")])


def test_missing_triggers_setting_or_file_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIGGERS", raising=False)
    with pytest.raises(HandlerError, match="needs TRIGGERS as the file of triggers"):
        load([built_in("trigger_in")])
    monkeypatch.setenv("TRIGGERS", "/nowhere/triggers.toml")
    with pytest.raises(HandlerError, match="cannot be read"):
        load([built_in("trigger_in")])


def test_recipe_names_are_not_checked_without_a_recipes_file(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(TRIGGERS.replace('"rare"', '"another"'))
    for value in ("", "/nowhere"):
        monkeypatch.setenv("RECEIVER_RECIPES", value)
        assert load([built_in("trigger_in")]).routes["trigger"].rest
