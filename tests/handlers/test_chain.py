"""`chain` submits the next prediction from a result, once, and ends somewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import msgspec
import pytest

from receiver import Event, Output, Prediction, Stored, on
from receiver.deliveries.importing import load
from receiver.emulator import Rule
from receiver.model.answers import Delivery
from receiver.model.errors import HandlerError
from receiver.testing import Kit, make_event, run
from tests.handlers.parts import built_in

Kits = Callable[..., Kit]

URL: Final = "https://cdn.example/a.png"
DATA: Final = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Give the handler's file, set as a test wants it."""

    def chain(input: Any = None, **more: str) -> str:
        given = {
            "PROVIDER": "eachlabs",
            "MODEL": "upscale",
            "INPUT": json.dumps(input or {"image_url": "{url}"}),
            **{name.upper(): value for name, value in more.items()},
        }
        for name in ("FROM", "DEPTH", "METADATA"):
            monkeypatch.delenv(f"CHAIN_{name}", raising=False)
        for name, value in given.items():
            monkeypatch.setenv(f"CHAIN_{name}", value)
        return built_in("chain")

    return chain


def kept(url: str, flagged: str | None = None) -> Stored:
    return Stored(url=url, sha256=64 * "0", size=8, content_type="image/png", flagged=flagged)


def told(file: str, event: Event) -> Any:
    """Run the handler once, without a receiver."""
    return run(load([file]).handlers["chain"].function, event)


class Predictions(msgspec.Struct):
    data: list[Prediction]


def newest(kit: Kit) -> Prediction:
    return kit.get("/v1/predictions?limit=1", Predictions).data[0]


class Deliveries(msgspec.Struct):
    data: list[Delivery]


def ends(kit: Kit, prediction: Prediction) -> list[tuple[str, str]]:
    """Give the states and reasons of a prediction's deliveries."""
    found = kit.get(f"/v1/deliveries?prediction={prediction.id}", Deliveries).data
    return [(delivery.state, str(delivery.reason)) for delivery in found]


# --- what is submitted ---


def test_a_result_leads_to_the_next_prediction(chain: Any, receiver_kit: Kits) -> None:
    kit = receiver_kit(chain({"image_url": "{url}", "prompt": "{prompt}, at night", "scale": 2}))
    delivered = kit.deliver(make_event(metadata={"order": 7}), times=2)
    [child] = delivered.children
    assert delivered.delivery.state == "done"
    assert (child.provider, child.model) == ("eachlabs", "upscale")
    assert child.input == {"image_url": URL, "prompt": "a lighthouse, at night", "scale": 2}
    assert (child.parent_id, child.depth) == (delivered.prediction_id, 1)
    assert child.metadata == {"order": 7}


def test_every_address_becomes_an_item_and_texts_are_filled_at_any_depth(chain: Any) -> None:
    given = {
        "image_urls": ["https://style.example/s.png", "{urls}"],
        "nested": {"layers": [[{"source": "{url}"}], ["{urls}"]], "on": True, "none": None},
        "lines": "{urls}",
        "note": "{metadata[note]}{{}}",
    }
    second = "https://cdn.example/b.mp4"
    note = {"note": "{url} {{x}} {prompt.__class__}"}
    [child] = told(chain(given), make_event(output=[URL, second], metadata=note)).submitted
    assert child.input == {
        "image_urls": ["https://style.example/s.png", URL, second],
        "nested": {"layers": [[{"source": URL}], [URL, second]], "on": True, "none": None},
        "lines": f"{URL}\n{second}",
        "note": "{url} {{x}} {prompt.__class__}{}",
    }


@pytest.mark.parametrize("note", [7, None, [1, {"a": 2}], {"b": True}, "\r\n\u202e"])
def test_odd_metadata_does_no_harm(chain: Any, note: Any) -> None:
    result = told(chain({"note": "{metadata[note]}"}), make_event(metadata={"note": note}))
    assert result.state == "done"
    assert result.submitted[0].metadata == {"note": note}
    assert isinstance(result.submitted[0].input["note"], str)


def test_metadata_is_added_to_the_parent_s(chain: Any, receiver_kit: Kits) -> None:
    file = chain(metadata='{"step": "upscale", "order": 8}')
    delivered = receiver_kit(file).deliver(make_event(metadata={"order": 7, "channel": "#art"}))
    [child] = delivered.children
    assert child.metadata == {"order": 8, "channel": "#art", "step": "upscale"}
    assert delivered.prediction.metadata == {"order": 7, "channel": "#art"}


def test_only_the_models_that_are_named_are_started_from(chain: Any, receiver_kit: Kits) -> None:
    kit = receiver_kit(chain(**{"from": "fal-ai/*"}))
    assert kit.deliver(make_event(model="fal-ai/flux")).delivery.state == "done"
    assert kit.deliver(make_event(model="acme/flux")).deliveries == {}


@pytest.mark.parametrize("kind", ["failed", "canceled"])
def test_what_did_not_succeed_leads_to_nothing(chain: Any, receiver_kit: Kits, kind: Any) -> None:
    delivered = receiver_kit(chain()).deliver(make_event(kind))
    assert (delivered.deliveries, delivered.children) == ({}, [])


# --- results ---


def test_a_result_that_is_kept_goes_by_its_lasting_address(chain: Any) -> None:
    lasting = "https://files.example/a.png"
    event = make_event(output=[Output(url=URL, stored=kept(lasting))])
    assert told(chain(), event).submitted[0].input == {"image_url": lasting}


def test_a_data_uri_that_is_kept_in_public_goes_by_its_address(chain: Any) -> None:
    lasting = "https://files.example/a.png"
    event = make_event(output=[Output(url=DATA, stored=kept(lasting))])
    assert told(chain(), event).submitted[0].input == {"image_url": lasting}


def test_what_is_kept_where_no_provider_can_get_it_goes_by_the_provider_s_address(
    chain: Any,
) -> None:
    event = make_event(output=[Output(url=URL, stored=kept("file:///results/a.png"))])
    assert told(chain(), event).submitted[0].input == {"image_url": URL}


@pytest.mark.parametrize("stored", [None, kept("file:///results/a.png"), kept("s3://b/a.png")])
def test_a_result_that_no_provider_can_get_is_dead(chain: Any, stored: Stored | None) -> None:
    result = told(chain(), make_event(output=[Output(url=DATA, stored=stored)]))
    assert (result.state, result.submitted) == ("dead", [])
    assert "data: URI" in result.reason
    assert "SAVE_PUBLIC_URL" in result.reason


def test_the_results_that_can_be_got_go_without_the_others(chain: Any) -> None:
    output = [
        Output(url=DATA, stored=kept("file:///results/a.png")),
        Output(url="https://cdn.example/black.png", stored=kept(URL, flagged="all_black")),
        Output(url=URL),
    ]
    [child] = told(chain({"one": "{url}", "all": ["{urls}"]}), make_event(output=output)).submitted
    assert child.input == {"one": URL, "all": [URL]}


def test_a_flagged_result_is_not_worth_money(chain: Any) -> None:
    result = told(chain(), make_event(output=[Output(url=URL, stored=kept(URL, "all_black"))]))
    assert (result.state, result.submitted) == ("skipped", [])
    assert "all_black" in result.reason


def test_words_alone_lead_to_nothing(chain: Any) -> None:
    result = told(chain(), make_event(output=[Output(text="a lighthouse")]))
    assert (result.state, result.reason) == ("skipped", "no result has an address")


# --- where it ends ---


def test_what_it_submitted_does_not_start_it_again(chain: Any, receiver_kit: Kits) -> None:
    kit = receiver_kit(chain())
    delivered = kit.deliver(make_event(provider="eachlabs", model="upscale"))
    [child] = delivered.children
    kit.finish(child, make_event())
    assert newest(kit).id == child.id
    reason = "this one is 1 deep, and CHAIN_DEPTH is 1"
    assert ends(kit, child) == [("skipped", reason)]


def circle(kit: Kit) -> list[Prediction]:
    """Let the provider answer for ever; give all that was submitted, the first one first."""
    chained = [kit.deliver(make_event()).prediction]
    for number in range(10):
        new = newest(kit)
        if new.id == chained[-1].id:
            return chained
        chained.append(new)
        # Its own input would be no result.
        kit.finish(new, make_event(output=[f"https://cdn.example/{number}.png"]))
    raise AssertionError("it goes on for ever")


def test_it_goes_as_deep_as_it_may(chain: Any, receiver_kit: Kits) -> None:
    chained = circle(receiver_kit(chain(depth="3")))
    assert [prediction.depth for prediction in chained] == [0, 1, 2, 3]
    assert [prediction.parent_id for prediction in chained[1:]] == [p.id for p in chained[:-1]]


def test_no_depth_is_deeper_than_the_receiver_s_own(chain: Any, receiver_kit: Kits) -> None:
    kit = receiver_kit(chain(depth="1000"), settings={"RECEIVER_MAX_CHAIN": "2"})
    chained = circle(kit)
    assert [prediction.depth for prediction in chained] == [0, 1, 2]
    reason = "2 predictions have led to this one: no more are submitted"
    assert ends(kit, chained[-1]) == [("dead", reason)]


# --- once, whatever happens ---


def test_a_crash_before_it_runs_submits_once(chain: Any, receiver_kit: Kits) -> None:
    assert len(receiver_kit(chain()).crash_after_ack(make_event()).children) == 1


def test_a_crash_after_it_ran_does_not_submit_again(chain: Any, receiver_kit: Kits) -> None:
    delivered = receiver_kit(chain()).crash_after_run(make_event())
    assert (delivered.delivery.state, len(delivered.children)) == ("done", 1)


def test_a_replay_means_to_do_it_again(chain: Any, receiver_kit: Kits) -> None:
    kit = receiver_kit(chain())
    delivered = kit.deliver(make_event())
    kit.replay(delivered)
    assert len(delivered.children) == 2


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (Rule(fault="refuse_submit", status=400, reason="no such model"), "failed"),
        (Rule(fault="refuse_submit", status=429), "queued"),
        (Rule(fault="drop_submit"), "unconfirmed"),
    ],
)
def test_what_the_provider_makes_of_it_is_the_child_s_affair(
    chain: Any, receiver_kit: Kits, fault: Rule, status: str
) -> None:
    @on("succeeded", name="save")
    def save(_: Event) -> None:
        kit._providers.faults.replace([fault])  # noqa: SLF001 - the kit has no word for it

    kit = receiver_kit(save, chain())
    delivered = kit.deliver(make_event())
    assert delivered.deliveries["chain"].state == "done"
    [child] = delivered.children
    assert (child.status, child.parent_id) == (status, delivered.prediction_id)
    kit.exhaust(delivered)
    assert len(delivered.children) == 1


def test_what_could_never_be_submitted_ends_dead_and_costs_nothing(
    chain: Any, receiver_kit: Kits
) -> None:
    kit = receiver_kit(chain(provider="nobody"), settings={"RECEIVER_RETRY_ATTEMPTS": "2"})
    delivered = kit.deliver(make_event())
    kit.exhaust(delivered)
    assert (delivered.delivery.state, delivered.children) == ("dead", [])
    assert "provider must be one of" in str(delivered.delivery.reason)


# --- settings ---


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"provider": ""}, "CHAIN_PROVIDER and CHAIN_MODEL"),
        ({"model": ""}, "CHAIN_PROVIDER and CHAIN_MODEL"),
        ({"input": ["{url}"]}, "CHAIN_INPUT must be a JSON object"),
        ({"input": {"a": "{nothing}"}}, "is not a field"),
        ({"input": {"a": [{"b": "{prompt.__class__}"}]}}, "is not a field"),
        ({"input": {"a": "{"}}, "chain"),
        ({"metadata": "[1]"}, "CHAIN_METADATA must be a JSON object"),
        ({"metadata": "{"}, "CHAIN_METADATA must be a JSON object"),
        ({"depth": "-1"}, "CHAIN_DEPTH must be a whole number"),
        ({"depth": "deep"}, "CHAIN_DEPTH must be a whole number"),
    ],
)
def test_senseless_settings_cannot_be_loaded(chain: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(HandlerError, match=said):
        load([chain(**more)])


def test_an_input_there_must_be(chain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = chain()
    monkeypatch.delenv("CHAIN_INPUT")
    with pytest.raises(HandlerError, match="CHAIN_INPUT as a JSON object"):
        load([file])
