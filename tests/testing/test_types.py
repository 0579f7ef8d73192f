"""The results of a handler's context are typed, in async and in plain handlers."""

from __future__ import annotations

from typing import assert_type

from receiver import Context, Event, Fetched, Prediction, on
from receiver.testing import make_event, run

sent = True
URL = "https://cdn.example/a.txt"


def post() -> str:
    return "posted"


def number() -> int:
    return 7


def share() -> float:
    return 0.5


def pages() -> list[str]:
    return ["one", "two"]


def answer() -> dict[str, int]:
    return {"ts": 7}


def nothing() -> None: ...


async def later() -> int:
    return 8


@on("*", name="types/async")
async def awaits(_: Event, ctx: Context) -> None:
    assert assert_type(await ctx.fetch(URL), Fetched).read() == b"words"
    assert assert_type(await ctx.once("a", post), str).upper() == "POSTED"
    assert assert_type(await ctx.once("b", later), int) == 8
    assert assert_type(await ctx.once("c", number), int) == 7
    assert assert_type(await ctx.once("f", share), float) == 0.5
    assert assert_type(await ctx.once("g", pages), list[str]) == ["one", "two"]
    assert assert_type(await ctx.once("h", answer), dict[str, int]) == {"ts": 7}
    assert await ctx.once("i", lambda: sent) is True
    await ctx.once("d", nothing)
    await ctx.once("e", lambda: None)
    assert assert_type(await ctx.submit("fal", "m", {}), Prediction).model == "m"


@on("*", name="types/plain")
def plain(_: Event, ctx: Context) -> None:
    file: Fetched = ctx.fetch(URL)
    posted: str = ctx.once("a", post)
    counted: int = ctx.once("c", number)
    ctx.once("d", nothing)
    child: Prediction = ctx.submit("fal", "m", {})
    share_: float = ctx.once("f", share)
    words: list[str] = ctx.once("g", pages)
    body: dict[str, int] = ctx.once("h", answer)
    assert (share_, words, body["ts"], ctx.once("h", answer)["ts"]) == (0.5, pages(), 7, 7)
    assert assert_type(ctx.once("c", number) + 1, int) == 8
    assert (file.read(), posted, counted, child.model) == (b"words", "posted", 7, "m")
    assert assert_type(ctx.fetch(URL).size, int) == 5
    assert assert_type(ctx.once("a", post).upper(), str) == "POSTED"
    assert assert_type(ctx.submit("fal", "m", {}).id, str)


def test_context_results_have_the_declared_types() -> None:
    for handler in (awaits, plain):
        result = run(handler, make_event(), files={URL: b"words"})
        assert (result.state, result.reason) == ("done", "")
