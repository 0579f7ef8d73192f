"""`chain` submits the next prediction from a result, once, and comes to an end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from receiver import Context, Event, Output, Stored, on
from receiver.errors import HandlerError
from receiver.testing import Delivered, Kit, make_event

from .parts import built_in

A, B = "https://cdn.example/a.png", "https://cdn.example/b.png"
DATA: Final = "data:image/png;base64,iVBORw0KGgo="
INPUT: Final = {
    "prompt": "{prompt}, at night",
    "image_urls": ["{urls}"],
    "first": {"url": "{url}", "strength": 0.4},
}

Chain = Callable[..., Kit]


@pytest.fixture
def chain(receiver_kit: Callable[..., Kit], monkeypatch: pytest.MonkeyPatch) -> Chain:
    """Run the handler under settings, given by the ends of their names."""

    def start(
        *handlers: Any, settings: dict[str, str] | None = None, input: Any = INPUT, **given: str
    ) -> Kit:
        wanted = {"PROVIDER": "eachlabs", "MODEL": "edit", "INPUT": json.dumps(input), **given}
        for name, value in wanted.items():
            monkeypatch.setenv(f"CHAIN_{name}", value)
        return receiver_kit(*handlers, built_in("chain"), settings=settings)

    return start


def children(delivered: Delivered) -> int:
    return len(delivered.children)


def test_the_next_prediction_is_made_of_the_result(chain: Chain) -> None:
    event = make_event(input={"prompt": "a fox"}, output=[A, B], metadata={"order": 7})
    delivered = chain(METADATA='{"step": 2}').deliver(event, times=3)
    assert delivered.delivery.state == "done"
    [child] = delivered.children
    assert (child.provider, child.model, child.depth) == ("eachlabs", "edit", 1)
    assert child.parent_id == delivered.prediction_id
    assert child.input == {
        "prompt": "a fox, at night",
        "image_urls": [A, B],
        "first": {"url": A, "strength": 0.4},
    }
    assert child.metadata == {"order": 7, "step": 2}


@pytest.mark.parametrize("crash", ["crash_after_ack", "crash_after_run"])
def test_it_is_submitted_once_whatever_dies(chain: Chain, crash: str) -> None:
    delivered = getattr(chain(), crash)(make_event(output=[A]))
    assert (delivered.delivery.state, children(delivered)) == ("done", 1)


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (make_event(output=[]), "no result has an address"),
        (make_event(output=[Output(text="words")]), "no result has an address"),
    ],
)
def test_where_there_is_no_file_there_is_no_next(chain: Chain, event: Event, reason: str) -> None:
    delivered = chain().deliver(event)
    assert (delivered.delivery.state, delivered.delivery.reason) == ("skipped", reason)
    assert children(delivered) == 0


def test_failures_start_nothing(chain: Chain) -> None:
    assert chain().deliver(make_event("failed")).deliveries == {}


def test_only_the_models_that_are_named_start_it(chain: Chain) -> None:
    kit = chain(FROM="fal-ai/*")
    assert kit.deliver(make_event(model="other/one")).deliveries == {}
    assert children(kit.deliver(make_event(model="fal-ai/one"))) == 1


def test_a_result_that_only_we_have_is_a_clear_dead_letter(chain: Chain) -> None:
    delivered = chain().deliver(make_event(output=[DATA]))
    assert delivered.delivery.state == "dead"
    assert "data: URI" in delivered.delivery.reason
    assert children(delivered) == 0


def test_what_save_kept_is_passed_on_by_its_lasting_address(chain: Chain) -> None:
    kept = Stored(url="https://art.example/a.png", sha256="0", size=1, content_type="image/png")

    @on("succeeded", name="save")
    async def save(_: Event, ctx: Context) -> None:
        await ctx.record_stored(0, kept)

    [child] = chain(save).deliver(make_event(output=[DATA])).children
    assert child.input["image_urls"] == [kept.url]


def test_what_save_flagged_is_not_passed_on(chain: Chain, tmp_path: Path) -> None:
    black = Stored(
        url=tmp_path.as_uri(), sha256="0", size=1, content_type="image/png", flagged="all_black"
    )

    @on("succeeded", name="save")
    async def save(_: Event, ctx: Context) -> None:
        await ctx.record_stored(0, black)

    kit = chain(save)
    one = kit.deliver(make_event(output=[A]))
    assert (one.deliveries["chain"].state, children(one)) == ("skipped", 0)
    [child] = kit.deliver(make_event(output=[A, B])).children
    assert child.input["image_urls"] == [B]


@pytest.mark.parametrize("depth", ["0", "1", "3"])
def test_it_goes_as_deep_as_it_is_told(chain: Chain, depth: str) -> None:
    kit = chain(DEPTH=depth)
    delivered = kit.deliver(make_event(provider="eachlabs", model="edit"))
    for _ in range(int(depth)):
        [child] = delivered.children
        delivered = kit.finish(child, make_event(provider="eachlabs", model="edit"))
    assert (delivered.delivery.state, children(delivered)) == ("skipped", 0)
    assert f"CHAIN_DEPTH is {depth}" in delivered.delivery.reason


def test_the_receivers_own_limit_holds_above_it(chain: Chain) -> None:
    kit = chain(DEPTH="1000", settings={"RECEIVER_MAX_CHAIN": "1"})
    [child] = kit.deliver(make_event(provider="eachlabs", model="edit")).children
    delivered = kit.finish(child, make_event(provider="eachlabs", model="edit"))
    assert (delivered.delivery.state, children(delivered)) == ("dead", 0)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PROVIDER", "", "CHAIN_PROVIDER and CHAIN_MODEL"),
        ("MODEL", "", "CHAIN_PROVIDER and CHAIN_MODEL"),
        ("INPUT", "", "CHAIN_INPUT as a JSON object"),
        ("INPUT", "[1]", "CHAIN_INPUT as a JSON object"),
        ("INPUT", '{"prompt": "{nothing}"}', "is no field"),
        ("METADATA", "x", "CHAIN_METADATA as a JSON object"),
        ("DEPTH", "-1", "CHAIN_DEPTH must be a number"),
    ],
)
def test_senseless_settings_are_refused(chain: Chain, name: str, value: str, words: str) -> None:
    with pytest.raises(HandlerError, match=r"chain\.py") as raised:
        chain(**{name: value})
    assert words in str(raised.value)
