"""@route and @source: invalid arguments are rejected, and functions of plugins are found."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from receiver import Call, Reply, create_app, on, route, source
from receiver.deliveries.importing import load, register
from receiver.deliveries.registry import Registry
from receiver.model.errors import HandlerError
from receiver.settings import Settings
from tests.forked import run_to_end
from tests.receiving import ENV

HERE = Path(__file__).name

PLUGIN = """
from receiver import Call, Door, Reply, Unproved, on, read_settings, route, source

with read_settings() as read:
    KEY = read.secret("SHOP_KEY", "the key that the shop shows")

def prove(call: Call) -> None:
    if call.header("x-key") != KEY.reveal():
        raise Unproved("bad_key")

@route("{name}", proof=prove)
async def {function}(call: Call, door: Door) -> Reply:
    return Reply.empty()

@source("polled")
async def polled(door: Door):
    yield
"""


def prove(call: Call) -> None: ...


def yields(_: Call) -> Iterator[None]:
    yield


async def answer(_: Call, __: Any) -> Reply:
    return Reply.empty()


def refused(**given: Any) -> str:
    with pytest.raises(HandlerError) as raised:
        route(**{"name": "shop", "proof": prove, **given})(answer)
    return str(raised.value)


def test_route_without_proof_is_rejected_and_the_server_does_not_start(tmp_path: Path) -> None:
    """Invariant 14."""
    assert "a route needs proof=" in refused(proof=None)
    with pytest.raises(HandlerError, match=rf"{HERE}:\d+: a route needs proof="):
        route("shop")(answer)
    file = tmp_path / "open.py"
    file.write_text(PLUGIN.format(name="shop", function="shop").replace(", proof=prove", ""))
    serve = ["-m", "receiver", "serve", "--dev", "--port", "0", str(file)]
    ran = run_to_end(serve, tmp_path, {"SHOP_KEY": "right"})
    assert ran.returncode != 0
    assert "a route needs proof=" in ran.stderr


def test_missing_secret_of_a_route_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other load errors are reported with it; with the secret set, the plugin is loaded."""
    file, other = tmp_path / "shop.py", tmp_path / "other.py"
    file.write_text(PLUGIN.format(name="shop", function="shop"))
    other.write_text("import nothing_of_that_name")
    with pytest.raises(HandlerError, match=r"SHOP_KEY.*\n(.*\n)*.*nothing_of_that_name"):
        create_app(Settings.read(ENV), [str(file), str(other)])
    monkeypatch.setenv("SHOP_KEY", "right")
    found = load([str(file)])
    assert [*found.routes, *found.sources, *found.handlers] == ["shop", "polled"]
    assert "source polled has no route of its name" in str(found.warnings(()))
    assert found.routes["shop"].place == f"{file}:11"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"proof": int}, "proof must be a function"),
        ({"proof": "secret"}, "proof must be a function"),
        ({"proof": lambda: None}, "must take (call) or (call, door)"),
        ({"name": "Shop"}, "name must be of small letters"),
        ({"name": "a/b"}, "name must be of small letters"),
        ({"name": "-a"}, "name must be of small letters"),
        ({"name": "a" * 65}, "name must be of small letters"),
        ({"name": "shop\n"}, "name must be of small letters"),
        ({"name": None}, "name must be of small letters"),
        ({"longest": 0}, "longest must be a whole number"),
        ({"longest": "1MB"}, "longest must be a whole number"),
        ({"timeout": -1}, "timeout must be a number"),
        ({"timeout": True}, "timeout must be a number"),
        ({"longest": 0.5}, "longest must be a whole number above 0, up to 67108864"),
        ({"rest": "no"}, "rest must be True or False"),
        ({"proof": yields}, "yields yields, so that calling it proves nothing"),
        ({"methods": 5}, "methods must be of"),
        ({"methods": "POST"}, "methods must be of"),
        ({"methods": ["OPTIONS"]}, "methods must be of"),
        ({"methods": []}, "methods must be of"),
        ({"prof": 1}, "route() has no parameter prof (did you mean proof?)"),
    ],
)
def test_invalid_route_argument_is_rejected_with_its_file(given: dict[str, Any], says: str) -> None:
    message = refused(**given)
    assert says in message
    assert f"{HERE}:" in message


def plain(_: Call, __: Any) -> Reply:
    return Reply.empty()


async def alone(_: Call) -> Reply:
    return Reply.empty()


@pytest.mark.parametrize("function", [plain, alone, 3], ids=["plain", "alone", "number"])
def test_route_must_be_an_async_function_of_call_and_door(function: Any) -> None:
    with pytest.raises(HandlerError, match=r"must be an async function|must take"):
        route("shop", proof=prove)(function)


@pytest.mark.parametrize("function", [plain, answer], ids=["plain", "async"])
def test_source_must_be_an_async_generator_function(function: Any) -> None:
    with pytest.raises(HandlerError, match="must be an async generator"):
        source("shop")(function)


def test_proof_whose_second_parameter_has_a_default_gets_no_door() -> None:
    @route("default", proof=lambda _, __="mine": None)
    async def default(_: Call, __: Any) -> Reply:
        return Reply.empty()

    assert not register([default]).routes["default"].proof_takes_door


def test_duplicate_route_and_source_names_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_KEY", "right")
    files = [tmp_path / "one.py", tmp_path / "two.py"]
    for number, file in enumerate(files):
        file.write_text(PLUGIN.format(name="shop", function=f"shop_{number}"))
    with pytest.raises(HandlerError) as raised:
        load([str(file) for file in files])
    assert "the name 'shop' is taken by the route at" in str(raised.value)
    assert "the name 'polled' is taken by the source at" in str(raised.value)


def test_second_route_of_one_name_is_rejected_though_its_function_is_the_same() -> None:
    @route("twice", proof=prove)
    @route("twice", proof=prove, methods=("GET",))
    async def twice(_: Call, __: Any) -> Reply:
        return Reply.empty()

    with pytest.raises(HandlerError, match="the name 'twice' is taken by the route at"):
        register([twice])


def test_handler_route_and_source_of_the_same_name_can_be_registered() -> None:
    made: list[Callable[..., Any]] = []

    @route("mine", proof=prove)
    async def mine(_: Call, __: Any) -> Reply:
        return Reply.empty()

    @source("mine")
    async def polls(_: Any) -> AsyncGenerator[None, None]:
        yield

    made += [mine, polls, on("failed", name="mine")(lambda _: None)]
    found: Registry = register(made)
    assert (*found.handlers, *found.routes, *found.sources) == ("mine", "mine", "mine")
    assert [one.name for one in found.all()] == ["mine"] * 3
