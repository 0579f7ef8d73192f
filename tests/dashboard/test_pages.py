"""Dashboard pages show all data as escaped text, and their buttons, forms and filters work."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from receiver import Context, Dead, Event, Skip, on
from receiver.dashboard.rendering import dollars
from tests.conftest import Start
from tests.dashboard.people import ON, Person, buttons, forms, person
from tests.receiving import Station, eventually

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

EVIL = '<img src=x onerror="document.title=1">'
RECIPES = """\
[imagine]
about = "A <b>picture</b>"
provider = "fal"
model = "fal-ai/nano-banana"
input = { prompt = "{prompt}", steps = "{steps}" }
[imagine.options.prompt]
required = true
rest = true
[imagine.options.steps]
kind = "integer"
least = 1
most = 50
"""


FILTERS: Final[list[tuple[dict[str, str], str]]] = [
    ({"status": "succeeded"}, "a boat"),
    ({"status": "queued"}, ""),
    ({"provider": "fal", "text": "BOAT"}, "a boat"),
    ({"provider": "oxen"}, "a car"),
    ({"model": "FAL-ai/*"}, "a boat"),
    ({"model": "fal-ai"}, ""),
    ({"text": 'a "quoted'}, 'a "quoted" word'),
    ({"text": "100%"}, ""),
    ({"metadata.kind": "b*t"}, "a boat"),
    ({"meta": "kind", "is": "boat"}, "a boat"),
    ({"metadata.kind": "boat*", "metadata.size": "3"}, "a boat"),
    ({"metadata.nothing": "*"}, ""),
    ({"since": "2020-01-01", "until": "2021-01-01"}, ""),
    ({"since": "2020-01-01T00:00", "text": "car"}, "a car"),
    ({"person": "nobody"}, ""),
]


async def signed_in(station: Station) -> Person:
    someone = person(station)
    await someone.sign_in()
    return someone


async def done(station: Station, prompt: str = "a lighthouse", **more: Any) -> str:
    """Submit a prediction and let it succeed; return its id."""
    sent = await station.submitted("fal", prompt, **more)
    assert (await station.push(sent)).status_code == 200
    return sent.prediction_id


async def settled(station: Station, *states: str) -> None:
    await eventually(
        lambda: [row[0] for row in station.rows("SELECT state FROM deliveries ORDER BY handler")],
        lambda found: found == list(states),
    )


@on("succeeded", name="tell")
async def tell(event: Event, ctx: Context) -> None:
    ctx.note(f"noted {EVIL}")
    if "[dead]" in event.prediction.input["prompt"]:
        raise Dead(f"the chat said {EVIL}")


@on("failed", name="mourn")
async def mourn(event: Event) -> None:
    raise Skip(f"nobody wants {event.id}")


async def test_html_in_any_field_is_escaped(start: Start) -> None:
    async with start(tell, mourn, **ON) as station:
        name = await done(station, f"{EVIL} [dead]", metadata={EVIL: EVIL, "kind": EVIL})
        await settled(station, "dead")
        someone = await signed_in(station)
        await someone.press(f"/predictions/{name}", "Replay")
        await settled(station, "dead")
        await someone.act("/replays", state="dead", meta=EVIL, **{"is": "*"})
        for path in (
            "",
            "/predictions",
            "/predictions?view=grid",
            f"/predictions/{name}",
            "/deliveries",
            "/handlers",
            "/replays",
            "/discarded",
        ):
            page = await someone.see(path)
            assert EVIL not in page, path
            assert "<img src=x" not in page, path
        page = await someone.see(f"/predictions/{name}")
        assert unescape(page).count(EVIL) > 6
        for odd in ({"text": EVIL}, {"model": EVIL}, {"person": EVIL}, {f"metadata.{EVIL}": EVIL}):
            assert EVIL not in await someone.see("/predictions", **odd)


async def test_prediction_page_shows_input_outcome_and_deliveries(start: Start) -> None:
    async with start(tell, mourn, **ON) as station:
        name = await done(station, "a lighthouse", metadata={"kind": "tower"})
        await settled(station, "done")
        page = unescape(await (await signed_in(station)).see(f"/predictions/{name}"))
        for said in (
            "a lighthouse",
            '"kind": "tower"',
            "submitted to fal",
            "succeeded by webhook",
            "webhook: accepted",
            "tell, attempt 1: done",
            "noted <img",
            "type is prediction.succeeded",  # why `mourn` did not run
            "not saved",
            "cdn.test/a.png",
        ):
            assert said in page, said


@pytest.mark.parametrize(
    "body", ["[" * 9000, '{"a":' * 2500 + "1" + "}" * 2500, "[" * 9000 + "]" * 9000, '{"a": [1e999']
)
async def test_malformed_or_deeply_nested_callback_body_is_shown_as_received(
    start: Start, body: str
) -> None:
    async with start(**ON) as station:
        sent = await station.submitted("fal")
        assert (await station.push(sent, body=body.encode())).status_code == 200
        page = await (await signed_in(station)).see(f"/predictions/{sent.prediction_id}")
        assert body in unescape(page)


async def test_parent_and_child_predictions_link_to_each_other(start: Start) -> None:
    @on("succeeded", name="again")
    async def again(event: Event, ctx: Context) -> None:
        if event.prediction.depth == 0:
            await ctx.submit("eachlabs", "nano-banana", {"prompt": "the child"})

    async with start(again, **ON) as station:
        parent = await done(station, "the parent")
        child = (
            await eventually(lambda: [s for s in station.network.sent if s.prompt == "the child"])
        )[0]
        someone = await signed_in(station)
        assert f"/ui/predictions/{child.prediction_id}" in await someone.see(
            f"/predictions/{parent}"
        )
        assert f"/ui/predictions/{parent}" in await someone.see(
            f"/predictions/{child.prediction_id}"
        )


async def test_dead_letter_can_be_retried_and_prediction_replayed(start: Start) -> None:
    mood = {"dead": True}

    @on("succeeded", name="moody")
    async def moody(event: Event) -> None:
        if mood["dead"]:
            raise Dead(f"not today: {event.type}")

    async with start(moody, **ON) as station:
        name = await done(station)
        await settled(station, "dead")
        mood["dead"] = False
        someone = await signed_in(station)
        assert "not today" in await someone.see("/deliveries")
        answer = await someone.press("/deliveries", "Retry")
        assert answer.headers["location"] == "/ui/deliveries?done=retry"
        await settled(station, "done")
        assert "Done: retry" in await someone.see("/deliveries", done="retry")
        assert (await someone.press(f"/predictions/{name}", "Replay")).status_code == 303
        await eventually(lambda: station.one("SELECT count(*) FROM attempts"), lambda n: n == 3)


async def test_prediction_can_be_canceled_resubmitted_once_and_erased(start: Start) -> None:
    async with start(**ON) as station:
        made = await station.submitted("fal")
        someone = await signed_in(station)
        path = f"/predictions/{made.prediction_id}"
        assert set(buttons(await someone.see(path))) == {"Sign out", "Again", "Cancel"}
        await someone.press(path, "Cancel")
        await station.until(made.prediction_id, "canceled")
        action, form = next(
            (action, form)
            for action, form, text in forms(await someone.see(path))
            if text == "Again"
        )
        twice = [await someone.http.post(action, data=form) for _ in range(2)]
        assert twice[0].headers["location"] == twice[1].headers["location"]
        assert station.count("predictions") == 2
        await someone.press(path, "Erase for good")
        page = await someone.see(path)
        assert "what it was about is gone" in page
        assert "a lighthouse" not in page
        assert buttons(page) == ["Sign out"]
        assert (await someone.act(f"{path}/again", key="k")).status_code == 409


async def test_failed_action_returns_an_error_and_is_audited(start: Start) -> None:
    async with start(**ON) as station:
        name = await done(station)
        someone = await signed_in(station)
        answer = await someone.act(f"/predictions/{name}/cancel")
        assert answer.status_code == 409
        assert "That did not work" in answer.text
        assert station.one("SELECT result FROM audit") == "already-ended"
        assert (await someone.act(f"/predictions/pred_{'0' * 32}/replay")).status_code == 404
        assert (await someone.act("/handlers/pause", name="nobody")).status_code == 404
        assert (await someone.act("/replays")).status_code == 422


async def test_handlers_are_paused_and_resumed(start: Start) -> None:
    async with start(tell, **ON) as station:
        someone = await signed_in(station)
        await someone.press("/handlers", "Pause")
        await done(station)
        page = await someone.see("/handlers")
        assert "paused" in page
        assert "Held back" in await someone.see("")
        await settled(station, "pending")
        await someone.press("/handlers", "Resume")
        await settled(station, "done")


async def test_replay_is_counted_before_it_is_started(start: Start) -> None:
    async with start(tell, **ON) as station:
        await done(station)
        await settled(station, "done")
        someone = await signed_in(station)
        times = {"since": "2020-01-01", "until": "2100-01-01T00:00+01:00"}
        assert (await someone.act("/replays", since="yesterday")).status_code == 422
        counted = await someone.act("/replays", handler="tell", **times)
        path = counted.headers["location"].removeprefix("/ui").partition("?")[0]
        assert "Start: 1 deliveries" in await someone.see(path)
        assert station.count("attempts") == 1
        await someone.press(path, "Start: 1 deliveries")
        await eventually(lambda: station.count("attempts"), lambda n: n == 2)
        assert "done" in await eventually(lambda: someone.see(path), lambda page: "s-done" in page)
        assert (await someone.act(f"{path}/cancel")).status_code == 409


async def test_recipe_form_is_validated_and_orders_once(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "recipes.toml"
    file.write_text(RECIPES)
    async with start(**ON, RECEIVER_RECIPES=str(file)) as station:
        someone = await signed_in(station)
        assert "A &lt;b&gt;picture&lt;/b&gt;" in await someone.see("/recipes")
        _, form, _ = forms(await someone.see("/recipes/imagine"))[-1]
        bad = await someone.http.post("/ui/recipes/imagine", data={**form, "option.steps": "99"})
        assert bad.status_code == 422
        assert "prompt is missing" in bad.text
        assert "must be 50 or less" in bad.text
        assert 'value="99"' in bad.text
        filled = {**form, "option.prompt": "a boat", "option.steps": "3"}
        answers = [await someone.http.post("/ui/recipes/imagine", data=filled) for _ in range(2)]
        [where] = {answer.headers["location"] for answer in answers}
        page = await someone.see(where.removeprefix("/ui").partition("?")[0])
        assert "a boat" in page
        assert '<a href="/ui/predictions?recipe=imagine">imagine</a>' in page
        assert (await someone.see("/recipes/nothing", 404)).count("there is no recipe")
        again = await someone.press(where.removeprefix("/ui").partition("?")[0], "Again")
        assert again.status_code == 303
        assert station.count("orders") == 2
        assert "a boat" in await someone.see("/predictions", recipe="imagine")
        assert "None that fits" in await someone.see("/predictions", recipe="other")


async def test_filters_select_matching_predictions_and_can_be_removed(start: Start) -> None:
    async with start(**ON) as station:
        await done(station, "a boat", metadata={"kind": "boat", "size": 3})
        await station.submitted("oxen", "a car", metadata={"kind": "car"})
        await station.submitted("eachlabs", 'a "quoted" word')
        someone = await signed_in(station)
        for query, fits in FILTERS:
            page = unescape(await someone.see("/predictions", **query))
            words = ("a boat", "a car", 'a "quoted" word')
            listed = {text for text in words if f">{text}</a>" in page}
            assert listed == ({fits} if fits else set()), query
            removals = re.findall(r'class="chip" href="/ui/predictions([^"]*)"', page)
            assert len(removals) == len({*query} - {"is"}), query
            assert removals == [""] or len(query) > 1, query


async def test_next_page_link_has_a_cursor_and_keeps_the_filters(start: Start) -> None:
    async with start(**ON) as station:
        for number in range(3):
            await station.submit("fal", f"boat {number}")
        station.edit(
            "INSERT INTO predictions (id, provider, model, mode, status, input, metadata, output, "
            "created_at, completed_at) "
            + " UNION ALL ".join(
                f"SELECT 'pred_{number:032x}', 'fal', 'm', 'queue', 'succeeded', "
                f"'{{\"prompt\":\"old {number}\"}}', '{{}}', '[]', {number}, {number}"
                for number in range(60)
            )
        )
        someone = await signed_in(station)
        first = await someone.see("/predictions", provider="fal")
        more = re.search(r'rel="next" href="/ui([^"]*)"', first)
        assert more
        assert "provider=fal" in more[1]
        second = await someone.see(unescape(more[1]))
        prompts = [re.findall(r">((?:boat|old) \d+)</a>", page) for page in (first, second)]
        assert [len(each) for each in prompts] == [50, 13]
        assert prompts[0][:3] == ["boat 2", "boat 1", "boat 0"]
        assert len({*prompts[0], *prompts[1]}) == 63
        assert 'rel="next"' not in second


async def test_incomplete_search_shows_how_far_it_has_looked(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.store.search._LOOKED_THROUGH", 3)
    async with start(**ON) as station:
        for number in range(8):
            await station.submit("fal", f"boat {number}")
        someone = await signed_in(station)
        page = await someone.see("/predictions", text="boat 1")
        for _ in range(2):
            assert "None was found. 3 predictions were looked through, back to <time" in page
            more = re.search(r'rel="next" href="/ui([^"]*)">Look further<', page)
            assert more
            page = await someone.see(unescape(more[1]))
        assert ">boat 1</a>" in page
        assert "looked through" not in page


def test_small_dollar_amounts_are_not_rounded_to_zero() -> None:
    amounts = (0.0, 0.000004, 0.0398, 0.5, 0.1 + 0.2, 1.0, 1234.567)
    shown = ("$0.00", "$0.000004", "$0.0398", "$0.50", "$0.30", "$1.00", "$1,234.57")
    assert tuple(map(dollars, amounts)) == shown


async def test_invalid_query_returns_422_and_unknown_path_404(start: Start) -> None:
    async with start(**ON) as station:
        someone = await signed_in(station)
        for query in (
            {"status": "odd"},
            {"since": "yesterday"},
            {"since": "99999-01-01"},
            {"cursor": "x"},
            {"text": "x" * 301},
            {f"metadata.n{number}": "x" for number in range(11)},
        ):
            await someone.see("/predictions", 422, **query)
        for name in ("text", "provider", "model", "recipe", "person", "metadata.\0", "meta"):
            await someone.see("/predictions", **{name: "\0", "is": "\0"})
        await someone.see("/deliveries", 422, state="odd")
        await someone.see("/discarded", 422, cursor="odd")
        await someone.see("/discarded", 422, cursor="1_\n")
        await someone.see("/replays", 422, cursor="odd")
        for path in ("/predictions/x", "/replays/x", "/nothing", "/recipes/UPPER"):
            await someone.see(path, 404)
        too_much = await someone.http.post(
            "/ui/handlers/pause", data={f"f{n}": "" for n in range(300)}
        )
        assert too_much.status_code == 422


async def test_discarded_callbacks_are_listed_by_kind(start: Start) -> None:
    async with start(**ON) as station:
        sent = await station.submitted("fal")
        for _ in range(2):
            await station.push(sent)
        assert (await station.world.post("/webhooks/fal/nothing", content=b"{}")).status_code == 401
        someone = await signed_in(station)
        page = await eventually(
            lambda: someone.see("/discarded"), lambda page: "s-rejected" in page
        )
        assert "s-duplicate" in page
        assert "s-unmatched" in page
        assert "s-duplicate" not in await someone.see("/discarded", kind="unmatched")


async def test_links_begin_with_the_path_of_the_public_url(start: Start) -> None:
    async with start(**ON, RECEIVER_PUBLIC_URL="https://hooks.test/api") as station:
        answer = await station.world.get("/api/ui/predictions")
        assert answer.headers["location"].startswith("/api/ui/sign-in")
        page = (await station.world.get("/api/ui/sign-in")).text
        assert 'action="/api/ui/sign-in"' in page
        assert httpx.URL(answer.headers["location"]).params["next"] == "/predictions"


async def test_costs_are_shown_by_group_and_on_the_prediction_page(
    start: Start, tmp_path: Path
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text('["fal/*"]\nimage = 0.039\n')
    async with start(**ON, RECEIVER_PRICES=str(prices), RECEIVER_COSTS_BY="team") as station:
        name = await done(station, metadata={"team": EVIL})
        someone = await signed_in(station)
        assert "$0.039" in await someone.see(f"/predictions/{name}")
        assert "<b>$0.039</b><span>spent today" in await someone.see("")
        for by in ("day", "provider", "model", "recipe", "key", "metadata.team", "day,model"):
            page = await someone.see("/costs", by=by)
            assert "<b>$0.039</b> for 1 predictions" in page, by
            assert EVIL not in page
        assert EVIL in unescape(await someone.see("/costs", by="metadata.team"))
        assert "Nothing ended" in await someone.see("/costs", until="2020-01-01")
        for query in ({"by": "odd"}, {"by": "metadata.other"}, {"since": "yesterday"}):
            await someone.see("/costs", 422, **query)
