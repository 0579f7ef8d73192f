"""The state machine of predictions, retry decisions, and ids: as tables and as properties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise, product
from typing import Final, cast, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.model.ids import delivery_id, event_id, handler_digest, new_id, prediction_id_of
from receiver.model.retry import (
    LONGEST_DELAY,
    LOSSES,
    Failure,
    FailureKind,
    Policy,
    backoff,
    decide,
)
from receiver.model.states import (
    IN_FLIGHT,
    TERMINAL,
    TRANSITIONS,
    Cause,
    Verdict,
    advance,
    cause_of,
    sources,
    step,
)
from receiver.model.values import Error, Outcome, OutcomeKind, Output, Status, utc

MANY: Final = settings(max_examples=100)

# Rows: status. Columns: begin, postponed, ambiguous, accepted, succeeded, failed, canceled.
CAUSES: Final = ("begin", "postponed", "ambiguous", "accepted", "succeeded", "failed", "canceled")
TABLE: Final = """
queued      submitting -      -           processing succeeded failed canceled
submitting  -          queued unconfirmed processing succeeded failed canceled
unconfirmed -          -      -           processing succeeded failed canceled
processing  -          -      -           -          succeeded failed canceled
succeeded   -          -      -           -          -         -      -
failed      -          -      -           -          -         -      -
canceled    -          -      -           -          -         -      -
"""


def arrows() -> list[tuple[str, str, str]]:
    rows = [line.split() for line in TABLE.strip().splitlines()]
    return [(row[0], cause, to) for row in rows for cause, to in zip(CAUSES, row[1:], strict=True)]


def test_prediction_status_follows_the_transition_table() -> None:
    for status, cause, to in arrows():
        assert step(Status(status), Cause(cause)) == (None if to == "-" else to), (status, cause)


def test_transition_table_covers_every_status_and_cause() -> None:
    assert {(status, cause) for status, cause, _ in arrows()} == set(product(Status, Cause))
    assert set(TRANSITIONS) == set(Status)


def test_terminal_statuses_are_those_without_a_transition() -> None:
    assert frozenset(status for status in Status if not TRANSITIONS[status]) == TERMINAL


def test_every_open_status_can_reach_every_terminal_status() -> None:
    for status in set(Status) - TERMINAL:
        assert {to for to in TRANSITIONS[status].values() if to in TERMINAL} == TERMINAL


def test_in_flight_statuses_are_all_open_ones_except_queued() -> None:
    assert frozenset(Status) - TERMINAL - {Status.QUEUED} == IN_FLIGHT


@pytest.mark.parametrize("cause", Cause)
def test_sources_of_a_cause_are_the_statuses_it_can_leave(cause: Cause) -> None:
    assert sources(cause) == {row for row, column, to in arrows() if column == cause and to != "-"}


# One row per status, one column per outcome; `+` marks an outcome that names the provider's id.
KINDS: Final = ("processing", "ask", "missing", "succeeded", "failed", "canceled")
ADVANCES: Final = """
queued       noted:queued      ask:queued      noted:queued      !succeeded !failed !canceled
queued+      noted:processing  ask:processing  noted:queued      !succeeded !failed !canceled
submitting   noted:submitting  ask:submitting  noted:submitting  !succeeded !failed !canceled
submitting+  noted:processing  ask:processing  noted:submitting  !succeeded !failed !canceled
unconfirmed  noted:unconfirmed ask:unconfirmed noted:unconfirmed !succeeded !failed !canceled
unconfirmed+ noted:processing  ask:processing  noted:unconfirmed !succeeded !failed !canceled
processing   noted:processing  ask:processing  noted:processing  !succeeded !failed !canceled
processing+  noted:processing  ask:processing  noted:processing  !succeeded !failed !canceled
succeeded    duplicate         duplicate       duplicate         duplicate  late    late
succeeded+   duplicate         duplicate       duplicate         duplicate  late    late
failed       duplicate         duplicate       duplicate         late       duplicate late
failed+      duplicate         duplicate       duplicate         late       duplicate late
canceled     duplicate         duplicate       duplicate         late       late    duplicate
canceled+    duplicate         duplicate       duplicate         late       late    duplicate
"""


def advances() -> list[tuple[str, bool, str, str, str]]:
    found = []
    for line in ADVANCES.strip().splitlines():
        row, *cells = line.split()
        status = row.rstrip("+")
        for kind, cell in zip(KINDS, cells, strict=True):
            verdict, _, to = cell.partition(":")
            if verdict.startswith("!"):
                verdict, to = "accepted", verdict[1:]
            found.append((status, row.endswith("+"), kind, verdict, to or status))
    return found


@pytest.mark.parametrize("known", [None, "req-1"])
def test_outcome_advances_a_prediction_as_in_the_table(known: str | None) -> None:
    for status, named, kind, verdict, to in advances():
        outcome = Outcome(kind=cast("OutcomeKind", kind), provider_id="req-1" if named else None)
        said, became, reason = advance(Status(status), known, outcome)
        assert (said, became) == (verdict, to), (status, named, kind)
        assert reason


def test_outcome_table_covers_every_status_and_kind() -> None:
    rows = {(status, named, kind) for status, named, kind, _, _ in advances()}
    assert rows == set(product(Status, (False, True), get_args(OutcomeKind)))


@pytest.mark.parametrize("kind", get_args(OutcomeKind))
def test_outcome_of_another_prediction_is_a_mismatch(kind: OutcomeKind) -> None:
    outcome = Outcome(kind=kind, provider_id="req-2", also_known_as="gw-2")
    for status in Status:
        assert advance(status, "req-1", outcome)[:2] == ("mismatch", status)


@pytest.mark.parametrize(
    ("provider_id", "also_known_as"),
    [("req-1", None), ("req-1", "gw-1"), ("other", "req-1"), (None, "req-1"), (None, None)],
)
def test_outcome_matches_by_either_id_or_without_an_id(
    provider_id: str | None, also_known_as: str | None
) -> None:
    outcome = Outcome(kind="succeeded", provider_id=provider_id, also_known_as=also_known_as)
    assert advance(Status.PROCESSING, "req-1", outcome)[0] == "accepted"


def test_reason_of_a_late_outcome_names_both_statuses() -> None:
    reason = advance(Status.CANCELED, None, Outcome(kind="succeeded"))[2]
    assert reason == "already canceled, then told succeeded"


outcomes = st.builds(
    Outcome,
    kind=st.sampled_from(get_args(OutcomeKind)),
    provider_id=st.sampled_from([None, "req-1", "req-2"]),
    also_known_as=st.sampled_from([None, "req-1", "gw-1"]),
)


@MANY
@given(
    status=st.sampled_from(Status),
    known=st.sampled_from([None, "req-1"]),
    history=st.lists(outcomes, max_size=30),
)
def test_at_most_one_outcome_is_accepted_and_the_end_never_changes(
    status: Status, known: str | None, history: Sequence[Outcome]
) -> None:
    accepted = 0
    for outcome in history:
        before = status
        verdict, status, reason = advance(status, known, outcome)
        assert verdict in get_args(Verdict)
        assert reason
        if before in TERMINAL:
            assert status is before
            assert verdict in {"duplicate", "late", "mismatch"}
        if verdict == "accepted":
            accepted += 1
            assert status in TERMINAL
            assert status == outcome.kind
        else:
            assert status is before or (before, status) in {
                (Status.SUBMITTING, Status.PROCESSING),
                (Status.UNCONFIRMED, Status.PROCESSING),
                (Status.QUEUED, Status.PROCESSING),
            }
    assert accepted <= 1
    ended = any(
        cause_of(o) and advance(Status.PROCESSING, known, o)[0] == "accepted" for o in history
    )
    assert (status in TERMINAL) >= ended


@MANY
@given(history=st.lists(outcomes, max_size=30))
def test_repeated_outcome_is_a_duplicate(history: Sequence[Outcome]) -> None:
    status = Status.PROCESSING
    for outcome in history:
        verdict, status, _ = advance(status, None, outcome)
        if verdict == "accepted":
            assert advance(status, None, outcome)[0] == "duplicate"


# --- Attempts ------------------------------------------------------------------------------------

POLICY: Final = Policy(attempts=4, base=2.0, cap=10.0)


@pytest.mark.parametrize(
    ("attempt", "base", "cap", "longest"),
    [
        (1, 2.0, 3600.0, 2.0),
        (2, 2.0, 3600.0, 4.0),
        (5, 2.0, 3600.0, 32.0),
        (11, 2.0, 3600.0, 2048.0),
        (12, 2.0, 3600.0, 3600.0),
        (1, 5.0, 3.0, 3.0),
        (65, 1.0, 1e30, 2.0**64),
        (66, 1.0, 1e30, 2.0**64),
        (10**9, 2.0, 3600.0, 3600.0),
    ],
)
def test_backoff_doubles_up_to_its_cap(
    attempt: int, base: float, cap: float, longest: float
) -> None:
    assert backoff(attempt, base, cap, 1.0) == longest
    assert backoff(attempt, base, cap, 0.5) == longest / 2
    assert backoff(attempt, base, cap, 0.0) == 0.0


def test_default_policy_waits_about_17_minutes_in_total_at_most() -> None:
    policy = Policy()
    waits = [backoff(n, policy.base, policy.cap, 1.0) for n in range(1, policy.attempts)]
    assert sum(waits) == 2 + 4 + 8 + 16 + 32 + 64 + 128 + 256 + 512


# Columns: kind of failure, attempt (of four), state, longest delay if pending.
DECISIONS: Final = """
error   1 pending 2
error   2 pending 4
error   3 pending 8
error   4 dead    -
error   9 dead    -
timeout 1 pending 2
timeout 3 pending 8
timeout 4 dead    -
retry   1 pending 2
retry   3 pending 8
retry   4 dead    -
lost    1 pending 0
lost    3 pending 0
lost    4 dead    -
lost    9 dead    -
skip    1 skipped -
skip    9 skipped -
dead    1 dead    -
dead    9 dead    -
"""


@pytest.mark.parametrize(
    ("kind", "attempt", "state", "longest"),
    [line.split() for line in DECISIONS.strip().splitlines()],
)
def test_failure_is_decided_as_in_the_table(
    kind: FailureKind, attempt: str, state: str, longest: str
) -> None:
    decision = decide(int(attempt), Failure(kind=kind, reason="why"), POLICY, 1.0)
    expected = 0.0 if longest == "-" else float(longest)
    assert (decision.state, decision.delay, decision.reason) == (state, expected, "why")


def test_decision_table_covers_every_kind_of_failure() -> None:
    assert {line.split()[0] for line in DECISIONS.strip().splitlines()} == set(
        get_args(FailureKind)
    )


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_delivery_is_dead_after_three_lost_attempts_if_the_policy_is_stricter(
    attempts: int,
) -> None:
    policy = Policy(attempts=attempts)
    states = [decide(n, Failure(kind="lost"), policy, 0.5).state for n in range(1, 5)]
    assert LOSSES == 3
    assert states == ["pending", "pending", "dead", "dead"]


@pytest.mark.parametrize(
    ("after", "delay"),
    [
        (0.0, 0.0),
        (-5.0, 0.0),
        (30.0, 30.0),
        (LONGEST_DELAY + 1, 7 * 86400.0),
        (math.inf, 7 * 86400.0),
        (-math.inf, 0.0),
        (math.nan, 0.0),
    ],
)
@pytest.mark.parametrize("chance", [0.0, 0.9])
def test_retry_after_sets_the_delay_up_to_a_week(after: float, delay: float, chance: float) -> None:
    failure = Failure(kind="retry", after=after)
    assert decide(1, failure, POLICY, chance).delay == delay


def test_retry_after_does_not_add_attempts() -> None:
    assert decide(4, Failure(kind="retry", after=1.0), POLICY, 0.5).state == "dead"


@MANY
@given(
    kind=st.sampled_from(get_args(FailureKind)),
    attempt=st.integers(1, 10**6),
    after=st.none() | st.floats(),
    attempts=st.integers(1, 1000),
    base=st.floats(0, 1e9),
    cap=st.floats(0, 1e9),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_every_failure_gets_a_decision_within_its_limits(
    kind: FailureKind,
    attempt: int,
    after: float | None,
    attempts: int,
    base: float,
    cap: float,
    chance: float,
) -> None:
    policy = Policy(attempts=attempts, base=base, cap=cap)
    decision = decide(attempt, Failure(kind=kind, after=after), policy, chance)
    assert decision.state in {"pending", "skipped", "dead"}
    assert 0.0 <= decision.delay <= (LONGEST_DELAY if after is not None else cap)
    if decision.state != "pending":
        assert decision.delay == 0.0
    if attempt >= max(attempts, LOSSES):
        assert decision.state != "pending"


# --- Values --------------------------------------------------------------------------------------


def test_ids_sort_by_time_and_never_repeat() -> None:
    moments = [0.0, 0.000001, 1.0, 1767225600.0, 1767225600.00001, 4e9, 2.0**55 / 1e6]
    ids = [new_id("pred", now) for now in moments]
    assert ids == sorted(ids)
    assert all(earlier[:19] < later[:19] for earlier, later in pairwise(ids))
    assert len({new_id("evt", 1.0) for _ in range(1000)}) == 1000


@pytest.mark.parametrize("prefix", ["pred", "evt", "dlv"])
def test_id_has_its_prefix_and_a_fixed_length(prefix: str) -> None:
    made = new_id(prefix, 1767225600.5)
    assert made.startswith(f"{prefix}_06474846")
    assert len(made) == len(prefix) + 1 + 14 + 18
    assert made.isascii()
    assert "." not in made  # the callback token puts its signature after a dot


def test_event_and_delivery_ids_derive_from_prediction_and_handler() -> None:
    mine, other = new_id("pred", 1.0), new_id("pred", 1.0)
    assert event_id(mine) == f"evt_{mine.removeprefix('pred_')}"
    assert prediction_id_of(event_id(mine)) == prediction_id_of(mine) == mine
    ids = [delivery_id(p, name) for p in (mine, other) for name in ("a:run", "b:run")]
    assert len(set(ids)) == 4
    assert ids[0] == delivery_id(mine, "a:run")
    assert ids[0].startswith("dlv_")
    assert handler_digest("a:run") == "a0ab5c7a"  # stored: it must never change


def test_times_are_utc() -> None:
    assert utc(1767225600.0) == datetime(2026, 1, 1, tzinfo=UTC)


def test_value_fields_can_be_read_by_attribute_or_by_key() -> None:
    output = Output(url="https://files.example/1.png", width=3)
    assert (output["url"], output["width"], output["text"]) == (output.url, 3, None)
    for name in ("missing", "__class__", "__struct_fields__"):
        with pytest.raises(KeyError, match=name):
            output[name]


def test_values_are_immutable() -> None:
    error = Error(code="timeout", message="late")
    with pytest.raises(AttributeError):
        error.message = "early"  # type: ignore[misc] # it must fail


def test_output_json_omits_fields_without_a_value() -> None:
    assert msgspec.json.encode(Output(url="data:,")) == b'{"url":"data:,"}'
