"""`receiver.testing.run` shows how a handler's delivery would end."""

from __future__ import annotations

import copy
import functools

import httpx
import pytest

from receiver import Call, Context, Dead, Door, Event, Reply, Retry, Skip, Stored, on, route
from receiver.model.errors import HandlerError
from receiver.testing import make_event, run

URL = "https://cdn.example/a.png"
PNG = b"\x89PNG\r\n\x1a\n and more"


@on("succeeded", name="kit/works")
async def works(event: Event, ctx: Context) -> None:
    assert event.prediction.output
    file = await ctx.fetch(event.prediction.output[0])
    assert (file.read(), file.content_type) == (PNG, "image/png")
    await ctx.once("post", lambda: "posted")
    await ctx.submit("fal", "fal-ai/upscaler", {"image_url": event.prediction.output[0].url})
    answer = await ctx.http.get("https://chat.example/")
    assert answer.status_code == 200


@on("*", name="kit/ends", retry=Retry(attempts=2))
def ends(event: Event) -> None:
    reason = event.prediction.metadata["how"]
    raise {"skip": Skip, "dead": Dead, "retry": Retry, "error": ValueError}[reason](reason)


def test_run_reports_the_steps_and_submits_of_a_handler() -> None:
    result = run(works, make_event(), files={URL: PNG}, http=lambda _: httpx.Response(200))
    assert (result.state, result.error) == ("done", None)
    assert result.steps == {"post": '"posted"'}
    [chained] = result.submitted
    assert (chained.model, chained.input) == ("fal-ai/upscaler", {"image_url": URL})


def test_record_stored_rejects_an_output_index_out_of_range() -> None:
    @on("*", name="kit/stores")
    async def stores(event: Event, ctx: Context) -> None:
        place = int(event.prediction.metadata["place"])
        await ctx.record_stored(place, Stored(url=URL, sha256="0", size=1, content_type="a/b"))

    for place in ("-1", "1"):
        result = run(stores, make_event(metadata={"place": place}))
        assert isinstance(result.error, IndexError)
        assert not result.stored
    assert run(stores, make_event(metadata={"place": "0"})).state == "done"


def test_callable_object_and_imported_function_can_be_handlers() -> None:
    class Works:
        async def __call__(self, event: Event, ctx: Context) -> None:
            ctx.note(event.id)

    for given in (Works(), functools.partial(Works()), repr, copy.copy):
        assert run(on("*", name=f"kit/{given!r}")(given), make_event()).state == "done"


def test_route_cannot_be_run_as_a_handler() -> None:
    @route("kit", proof=lambda _: None)
    async def kit(_: Call, __: Door) -> Reply:
        raise NotImplementedError

    with pytest.raises(HandlerError, match="is a way in"):
        run(kit, make_event())


def test_stored_steps_are_not_run_again() -> None:
    @on("*", name="kit/once")
    async def once(_: Event, ctx: Context) -> None:
        assert await ctx.once("post", _must_not_run) == 7

    assert run(once, make_event(), attempt=2, steps={"post": "7"}).state == "done"


def _must_not_run() -> int:
    raise AssertionError("the step ran again")


@pytest.mark.parametrize(
    ("how", "attempt", "state"),
    [
        ("skip", 1, "skipped"),
        ("dead", 1, "dead"),
        ("retry", 1, "pending"),
        ("retry", 2, "dead"),
        ("error", 1, "pending"),
        ("error", 2, "dead"),
    ],
)
def test_run_ends_in_the_state_of_a_real_delivery(how: str, attempt: int, state: str) -> None:
    result = run(ends, make_event("failed", metadata={"how": how}), attempt=attempt)
    assert (result.state, how in result.reason) == (state, True)
    assert isinstance(result.error, ValueError) == (how == "error")


def test_http_request_without_a_given_answer_fails_the_attempt() -> None:
    result = run(works, make_event(), files={URL: PNG})
    assert result.state == "pending"
    assert "this test gave no answer" in result.reason


def test_fetch_of_a_file_that_was_not_given_is_dead() -> None:
    assert run(works, make_event()).state == "dead"


@pytest.mark.parametrize("kind", ["succeeded", "failed", "canceled"])
def test_make_event_builds_a_valid_event_of_each_type(kind: str) -> None:
    event = make_event(kind)  # type: ignore[arg-type] # the parameter is one of the three
    assert event.type == f"prediction.{kind}"
    assert event.id.removeprefix("evt_") == event.prediction.id.removeprefix("pred_")
    assert (event.prediction.output is None) == (kind != "succeeded")
    assert (event.prediction.error is None) == (kind == "succeeded")


def test_undecorated_function_cannot_be_run() -> None:
    with pytest.raises(HandlerError, match="decorate it with @on"):
        run(_must_not_run, make_event())
