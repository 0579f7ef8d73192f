"""`chain` submits the next prediction from a result, exactly once and to a limited depth."""

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
from receiver.testing import Kit, make_event, run
from tests.handlers.parts import built_in

Kits = Callable[..., Kit]

URL: Final = "https://cdn.example/a.png"
DATA: Final = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that sets the handler's settings and returns its file."""

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
    """Return the states and reasons of a prediction's deliveries."""
    found = kit.get(f"/v1/deliveries?prediction={prediction.id}", Deliveries).data
    return [(delivery.state, str(delivery.reason)) for delivery in found]


# --- submits ---


def test_result_submits_the_next_prediction(chain: Any, receiver_kit: Kits) -> None:
    kit = receiver_kit(chain({"image_url": "{url}", "prompt": "{prompt}, at night", "scale": 2}))
    delivered = kit.deliver(make_event(metadata={"order": 7}), times=2)
    [child] = delivered.children
    assert delivered.delivery.state == "done"
    assert (child.provider, child.model) == ("eachlabs", "upscale")
    assert child.input == {"image_url": URL, "prompt": "a lighthouse, at night", "scale": 2}
    assert (child.parent_id, child.depth) == (delivered.prediction_id, 1)
    assert child.metadata == {"order": 7}


def test_input_is_filled_at_any_depth_with_one_list_item_per_url(chain: Any) -> None:
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
def test_metadata_of_any_type_is_text_in_the_input_and_copied_unchanged(
    chain: Any, note: Any
) -> None:
    result = told(chain({"note": "{metadata[note]}"}), make_event(metadata={"note": note}))
    assert result.state == "done"
    assert result.submitted[0].metadata == {"note": note}
    assert isinstance(result.submitted[0].input["note"], str)


def test_chain_metadata_is_merged_into_the_metadata_of_the_parent(
    chain: Any, receiver_kit: Kits
) -> None:
    file = chain(metadata='{"step": "upscale", "order": 8}')
    delivered = receiver_kit(file).deliver(make_event(metadata={"order": 7, "channel": "#art"}))
    [child] = delivered.children
    assert child.metadata == {"order": 8, "channel": "#art", "step": "upscale"}
    assert delivered.prediction.metadata == {"order": 7, "channel": "#art"}


def test_only_models_that_match_chain_from_start_the_chain(chain: Any, receiver_kit: Kits) -> None:
    kit = receiver_kit(chain(**{"from": "fal-ai/*"}))
    assert kit.deliver(make_event(model="fal-ai/flux")).delivery.state == "done"
    assert kit.deliver(make_event(model="acme/flux")).deliveries == {}


@pytest.mark.parametrize("kind", ["failed", "canceled"])
def test_failed_and_canceled_predictions_submit_nothing(
    chain: Any, receiver_kit: Kits, kind: Any
) -> None:
    delivered = receiver_kit(chain()).deliver(make_event(kind))
    assert (delivered.deliveries, delivered.children) == ({}, [])


# --- results ---


def test_saved_result_is_passed_by_its_saved_url(chain: Any) -> None:
    lasting = "https://files.example/a.png"
    event = make_event(output=[Output(url=URL, stored=kept(lasting))])
    assert told(chain(), event).submitted[0].input == {"image_url": lasting}


def test_data_uri_with_a_public_saved_url_is_passed_by_that_url(chain: Any) -> None:
    lasting = "https://files.example/a.png"
    event = make_event(output=[Output(url=DATA, stored=kept(lasting))])
    assert told(chain(), event).submitted[0].input == {"image_url": lasting}


def test_result_saved_in_a_local_folder_is_passed_by_the_url_of_the_provider(
    chain: Any,
) -> None:
    event = make_event(output=[Output(url=URL, stored=kept("file:///results/a.png"))])
    assert told(chain(), event).submitted[0].input == {"image_url": URL}


@pytest.mark.parametrize("stored", [None, kept("file:///results/a.png"), kept("s3://b/a.png")])
def test_data_uri_without_a_public_url_ends_dead(chain: Any, stored: Stored | None) -> None:
    result = told(chain(), make_event(output=[Output(url=DATA, stored=stored)]))
    assert (result.state, result.submitted) == ("dead", [])
    assert "data: URI" in result.reason
    assert "SAVE_PUBLIC_URL" in result.reason


def test_results_that_are_flagged_or_have_no_public_url_are_left_out(chain: Any) -> None:
    output = [
        Output(url=DATA, stored=kept("file:///results/a.png")),
        Output(url="https://cdn.example/black.png", stored=kept(URL, flagged="all_black")),
        Output(url=URL),
    ]
    [child] = told(chain({"one": "{url}", "all": ["{urls}"]}), make_event(output=output)).submitted
    assert child.input == {"one": URL, "all": [URL]}


def test_flagged_result_is_skipped(chain: Any) -> None:
    result = told(chain(), make_event(output=[Output(url=URL, stored=kept(URL, "all_black"))]))
    assert (result.state, result.submitted) == ("skipped", [])
    assert "all_black" in result.reason


def test_text_output_is_skipped(chain: Any) -> None:
    result = told(chain(), make_event(output=[Output(text="a lighthouse")]))
    assert (result.state, result.reason) == ("skipped", "no result has an address")


# --- depth ---


def test_chained_prediction_does_not_start_the_chain_again(chain: Any, receiver_kit: Kits) -> None:
    kit = receiver_kit(chain())
    delivered = kit.deliver(make_event(provider="eachlabs", model="upscale"))
    [child] = delivered.children
    kit.finish(child, make_event())
    assert newest(kit).id == child.id
    reason = "this one is 1 deep, and CHAIN_DEPTH is 1"
    assert ends(kit, child) == [("skipped", reason)]


def circle(kit: Kit) -> list[Prediction]:
    """Let every prediction succeed until none is submitted; return all, the oldest first."""
    chained = [kit.deliver(make_event()).prediction]
    for number in range(10):
        new = newest(kit)
        if new.id == chained[-1].id:
            return chained
        chained.append(new)
        # A result must differ from the prediction's own input.
        kit.finish(new, make_event(output=[f"https://cdn.example/{number}.png"]))
    raise AssertionError("it goes on for ever")


def test_chain_stops_at_chain_depth(chain: Any, receiver_kit: Kits) -> None:
    chained = circle(receiver_kit(chain(depth="3")))
    assert [prediction.depth for prediction in chained] == [0, 1, 2, 3]
    assert [prediction.parent_id for prediction in chained[1:]] == [p.id for p in chained[:-1]]


def test_receiver_max_chain_limits_a_larger_chain_depth(chain: Any, receiver_kit: Kits) -> None:
    kit = receiver_kit(chain(depth="1000"), settings={"RECEIVER_MAX_CHAIN": "2"})
    chained = circle(kit)
    assert [prediction.depth for prediction in chained] == [0, 1, 2]
    reason = "2 predictions have led to this one: no more are submitted"
    assert ends(kit, chained[-1]) == [("dead", reason)]


# --- crashes, replays, failed submits ---


def test_crash_before_the_handler_runs_submits_once(chain: Any, receiver_kit: Kits) -> None:
    assert len(receiver_kit(chain()).crash_after_ack(make_event()).children) == 1


def test_crash_after_the_handler_ran_does_not_submit_again(chain: Any, receiver_kit: Kits) -> None:
    delivered = receiver_kit(chain()).crash_after_run(make_event())
    assert (delivered.delivery.state, len(delivered.children)) == ("done", 1)


def test_replay_submits_again(chain: Any, receiver_kit: Kits) -> None:
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
def test_rejected_or_ambiguous_submit_of_the_child_leaves_the_handler_done(
    chain: Any, receiver_kit: Kits, fault: Rule, status: str
) -> None:
    @on("succeeded", name="save")
    def save(_: Event) -> None:
        kit._providers.faults.replace([fault])  # noqa: SLF001 - the kit has no method for it

    kit = receiver_kit(save, chain())
    delivered = kit.deliver(make_event())
    assert delivered.deliveries["chain"].state == "done"
    [child] = delivered.children
    assert (child.status, child.parent_id) == (status, delivered.prediction_id)
    kit.exhaust(delivered)
    assert len(delivered.children) == 1


def test_unknown_provider_ends_dead_and_submits_nothing(chain: Any, receiver_kit: Kits) -> None:
    kit = receiver_kit(chain(provider="nobody"), settings={"RECEIVER_RETRY_ATTEMPTS": "2"})
    delivered = kit.deliver(make_event())
    kit.exhaust(delivered)
    assert (delivered.delivery.state, delivered.children) == ("dead", [])
    assert "provider must be one of" in str(delivered.delivery.reason)
