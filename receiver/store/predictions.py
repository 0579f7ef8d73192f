"""Predictions: created, submitted, polled, listed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import translate
from operator import attrgetter
from typing import Any, Final, Literal

import msgspec

from receiver.model.answers import Page
from receiver.model.costs import MICRO, Price
from receiver.model.ids import oldest_id
from receiver.model.requests import SubmitFields
from receiver.model.values import (
    LARGEST_METADATA,
    Channel,
    Cost,
    CostSource,
    Error,
    Order,
    Outcome,
    Output,
    Prediction,
    Status,
    Stored,
    Ticket,
    plain,
    utc,
)
from receiver.store.budgets import Bound, Counts, Excess
from receiver.store.engine import Repository, each
from receiver.store.limits import count_requests, hold_limits, room_for
from receiver.store.paging import listed, page_of
from receiver.store.statement import Row, Run, Statements, Steps, in_order, short, text

sql: Final = Statements("predictions")

_SCANNED: Final = 49
"""Predictions per read, without the extra one; their metadata may be large."""
_MOST_SCANS: Final = 40
"""Most reads for one list: 2,000 predictions are searched."""


class NewPrediction(SubmitFields, frozen=True, kw_only=True):
    """A prediction to be created, in status `queued`."""

    id: str
    parent_id: str | None = None
    idempotency_key: str | None = None
    fingerprint: str | None = None
    """A digest of the request, to distinguish a repeat from another request with the same key."""
    created_at: float
    trace: str | None = None
    """The W3C traceparent of the span that submits it, if there is one."""
    private: bytes | None = None
    """The private content, for handlers only, encrypted by `Seals`."""
    order: Order | None = None
    latest_at: float | None = None
    """The time from which it is too late to submit it."""
    price: int | None = None
    """Microdollars that it is expected to cost; None counts as 0."""
    price_source: CostSource | None = None
    account: str | None = None
    """What its cost is added up by besides provider and model, as JSON."""
    bounds: tuple[Bound, ...] = ()
    """The limits that apply to it."""


class CreateResult(msgspec.Struct, frozen=True):
    """The result of a creation: a prediction, new or of an earlier request by that key, or none."""

    prediction_id: str
    """Empty if there is none."""
    is_new: bool = False
    fingerprint: str | None = None
    """That of the row that has the idempotency key."""
    excess: Excess | None = None
    """The limit that prevented its creation."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A living prediction, as the submitter and the poller use it."""

    ticket: Ticket
    provider: str
    status: Status
    submits: int
    """How many times a submit was begun, including this one."""
    polls: int
    deadline_at: float | None
    """None while it only waits for room at the provider."""
    latest_at: float | None
    """The time from which it is too late to submit it; None: there is none yet."""
    held_until: float | None
    """When it is due again if the process that works on it dies; None once it has ended."""
    last_reason: str = ""
    """Why it has not ended yet, from the last answer."""
    trace: str | None = None
    """The W3C traceparent of the span that it was submitted in, if there was one."""


class SubmitBudget(msgspec.Struct, frozen=True, kw_only=True):
    """How many queued predictions of one provider may be submitted now."""

    provider: str
    now: float
    most: int
    max_in_flight: int | None
    at_most: int | None = None
    """Upper bound of those in flight, if the caller knows one; otherwise they are counted."""
    per_minute: int | None
    hold_until: float
    """When another process takes over a prediction if this one dies before sending anything."""
    timeout: float
    """Seconds from the first submit to the deadline."""


class SubmitBatch(msgspec.Struct, frozen=True):
    """Submits that may be sent now, and the seconds until the provider's minute has more room."""

    jobs: list[Job]
    wait: float
    next_due: float | None = None
    """When the next queued one may be submitted; None: there is none, or no room for it."""
    latest: float | None = None
    """The first time from which it is too late to submit a queued prediction."""
    at_most: int | None = None
    """Upper bound of those in flight after these, if their number is limited."""


ProgressCause = Literal["accepted", "postponed", "ambiguous", "polled"]
ProgressResult = Literal["recorded", "to_cancel", "taken"]
"""`to_cancel`: a caller requested a cancel before the provider's id was known; `taken`: the id
belongs to another prediction."""


class SendMark(msgspec.Struct, frozen=True, kw_only=True):
    """A request to send a submit that was begun."""

    id: str
    submits: int
    """That of the job; another number in the row means that another process began it again."""
    now: float
    hold_until: float
    """When another process takes it over if this one dies during the submit."""


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """A step of a living prediction that is not an outcome, such as accepted or polled."""

    id: str
    cause: ProgressCause
    due_at: float
    provider_id: str | None = None
    links: dict[str, str] = {}
    cost: int | None = None
    """Microdollars, if the answer to the submit contains them."""
    reason: str | None = None
    """Why it has not ended, for the error that it may end with; None keeps the last reason."""
    held_until: float | None = None
    """The time until which a poll held the row; set for polls only."""
    submits: int | None = None
    """That of the job, if it was postponed or is ambiguous: another submit is not concerned."""


class Annotation(msgspec.Struct, frozen=True, kw_only=True):
    """The data that a handler adds to an ended prediction."""

    prediction_id: str
    stored: Mapping[int, Stored] = {}
    """Where outputs are stored, by their index."""
    metadata: Mapping[str, Any] = {}


class PredictionFilter(msgspec.Struct, frozen=True, kw_only=True):
    """The filters of a list of predictions."""

    status: str | None = None
    provider: str | None = None
    model: str | None = None
    """A shell glob."""
    metadata: Mapping[str, str] = {}
    """Shell globs, by the name of the value."""
    since: float | None = None
    """The earliest creation time."""
    limit: int = 50
    cursor: str | None = None


def create(items: Sequence[NewPrediction]) -> Steps[list[CreateResult]]:
    counts = Counts()
    yield from counts.hold(bound for item in items for bound in item.bounds)
    results = yield from in_order(
        items, lambda new: (new.idempotency_key or "", new.id), lambda new: _create(new, counts)
    )
    yield from counts.write()
    return results


def _create(new: NewPrediction, counts: Counts) -> Steps[CreateResult]:
    # A repeated request was counted before, so no limit refuses it.
    if new.bounds and (first := (yield from _first(new))):
        return first
    if excess := counts.excess(new.bounds, new.price):
        return CreateResult("", excess=excess)
    while not (yield from insert(new, counts)):
        # The holder of the key may be deleted by another process between the two statements.
        if first := (yield from _first(new)):
            return first
    return CreateResult(new.id, is_new=True, fingerprint=new.fingerprint)


def _first(new: NewPrediction) -> Steps[CreateResult | None]:
    """Return the prediction that has the idempotency key of a new one."""
    if new.idempotency_key is None:
        return None
    row = {"idempotency_key": new.idempotency_key}
    for first in (yield Run(sql.select_by_idempotency_key, row)):
        return CreateResult(first["id"], fingerprint=first["fingerprint"])
    return None


def insert(new: NewPrediction, counts: Counts) -> Steps[bool]:
    """Insert a prediction, and count it; False: its idempotency key is taken."""
    row = msgspec.structs.asdict(new)
    row["reserved"] = counts.reservation(new.bounds, new.price)
    row |= {"input": text(new.input), "metadata": text(new.metadata)}
    row["private"] = None if new.private is None else new.private.decode()
    row["ordered"] = None if new.order is None else text(new.order)
    if not (yield Run(sql.insert_prediction, row)):
        return False
    counts.add(new.id, new.bounds, new.price, new.created_at)
    return True


def begin_submits(items: Sequence[SubmitBudget]) -> Steps[list[SubmitBatch]]:
    yield from hold_limits(
        item.provider
        for item in items
        if item.max_in_flight is not None or item.per_minute is not None
    )
    return (yield from in_order(items, lambda budget: budget.provider, _begin_some))


def _begin_some(budget: SubmitBudget) -> Steps[SubmitBatch]:
    provider = {"provider": budget.provider}
    most = budget.most
    wait = 0.0
    at_most = budget.at_most
    if budget.max_in_flight is not None:
        if at_most is None or at_most + most > budget.max_in_flight:
            bounded = {**provider, "max_in_flight": budget.max_in_flight}
            [row] = yield Run(sql.count_in_flight, bounded)
            at_most = row["number"]
        most = min(most, budget.max_in_flight - at_most)
    if budget.per_minute is not None:
        room, wait = yield from room_for(budget.provider, budget.now, budget.per_minute)
        most = min(most, room)
    if most <= 0:
        [row] = yield Run(sql.next_queued, provider)
        return SubmitBatch([], wait, latest=row["latest_at"])
    params = msgspec.structs.asdict(budget)
    params |= {"most": most, "deadline": budget.now + budget.timeout}
    jobs = [job_of(row) for row in (yield Run(sql.begin_submits, params))]
    if jobs and budget.per_minute is not None:
        yield from count_requests(budget.provider, budget.now, len(jobs))
    [row] = yield Run(sql.next_queued, provider)
    jobs.sort(key=lambda job: job.ticket.id)
    in_all = None if budget.max_in_flight is None or at_most is None else at_most + len(jobs)
    return SubmitBatch(jobs, wait, row["due_at"], row["latest_at"], in_all)


_PROGRESS: Final = {
    "accepted": sql.accept_submit,
    "postponed": sql.postpone_submit,
    "ambiguous": sql.mark_unconfirmed,
    "polled": sql.record_poll,
}


@short()
@each(attrgetter("id"))
def record_progress(item: Progress) -> Steps[ProgressResult]:
    row = msgspec.structs.asdict(item) | {"links": text(item.links)}
    found = yield Run(_PROGRESS[item.cause], row)
    return "to_cancel" if found and found[0]["is_to_cancel"] else "recorded"


@short()
@each(attrgetter("id"))
def mark_sent(item: SendMark) -> Steps[bool]:
    return bool((yield Run(sql.mark_sent, msgspec.structs.asdict(item))))


@each(attrgetter("prediction_id"))
def annotate(item: Annotation) -> Steps[None]:
    """Add a handler's results. Raises ValueError if the metadata would be too large."""
    prediction = {"id": item.prediction_id}
    for row in (yield Run(sql.select_result, prediction)):
        output = row["output"]
        outputs = None if output is None else _kept(output, item.stored)
        merged = msgspec.json.decode(row["metadata"]) | dict(item.metadata)
        size = len(msgspec.json.encode(merged))
        if item.metadata and size > LARGEST_METADATA:
            raise ValueError(f"the metadata has {size:,} bytes, more than {LARGEST_METADATA:,}")
        params = {**prediction, "output": outputs, "metadata": text(merged)}
        yield Run(sql.update_result, params)


def _kept(output: str, stored: Mapping[int, Stored]) -> str:
    outputs = msgspec.json.decode(output, type=list[Output])
    return text(
        [
            msgspec.structs.replace(item, stored=stored.get(place, item.stored))
            for place, item in enumerate(outputs)
        ]
    )


def end_of(
    prediction_id: str,
    status: Status,
    outcome: Outcome,
    channel: Channel | None,
    at: float,
    cost: Price | None,
) -> tuple[Any, ...]:
    """Return the row of `end_predictions` for an outcome."""
    error = outcome.error
    return (
        prediction_id,
        status,
        outcome.provider_id,
        text(outcome.output) if status is Status.SUCCEEDED else None,
        error.code if error else None,
        error.message if error else None,
        channel,
        at,
        *(cost or (None, None)),
    )


def job_of(row: Row) -> Job:
    return Job(
        ticket=Ticket(
            id=row["id"],
            model=row["model"],
            mode=row["mode"],
            input=msgspec.json.decode(row["input"]),
            provider_id=row["provider_id"],
            links=msgspec.json.decode(row["links"]),
            submitted_at=row["submitted_at"],
            cancel_requested=bool(row["cancel_requested"]),
        ),
        provider=row["provider"],
        status=Status(row["status"]),
        submits=row["submits"],
        polls=row["polls"],
        deadline_at=row["deadline_at"],
        latest_at=row["latest_at"],
        held_until=row["held_until"],
        last_reason=row["last_reason"] or "",
        trace=row["trace"],
    )


def prediction_of(row: Row) -> Prediction:
    output, code, ordered = row["output"], row["error_code"], row["ordered"]
    return Prediction(
        id=row["id"],
        provider=row["provider"],
        model=row["model"],
        status=Status(row["status"]),
        mode=row["mode"],
        input=msgspec.json.decode(row["input"]),
        metadata=msgspec.json.decode(row["metadata"]),
        provider_id=row["provider_id"],
        output=None if output is None else msgspec.json.decode(output, type=list[Output]),
        error=Error(code=code, message=row["error_message"]) if code else None,
        channel=row["channel"],
        parent_id=row["parent_id"],
        depth=row["depth"],
        created_at=utc(row["created_at"]),
        submitted_at=utc(row["submitted_at"]),
        completed_at=utc(row["completed_at"]),
        erased_at=utc(row["erased_at"]),
        reply_to=row["reply_to"],
        order=None if ordered is None else msgspec.json.decode(ordered, type=Order),
        cost=cost_of(row),
    )


def cost_of(row: Row) -> Cost | None:
    if row["cost"] is None:
        return None
    return Cost(amount=row["cost"] / MICRO, source=row["cost_source"])


def database_filters(wanted: PredictionFilter, cursor: str | None) -> dict[str, str | None]:
    """Return the filters that the database itself applies."""
    return {
        "status": wanted.status,
        "provider": wanted.provider,
        "since": None if wanted.since is None else oldest_id("pred", wanted.since),
        "cursor": cursor,
    }


def metadata_test(globs: Mapping[str, str]) -> Callable[[str], bool]:
    """Return a test whether metadata, as JSON, has values that match all these shell globs."""
    patterns = {name: re.compile(translate(glob)) for name, glob in globs.items()}

    def fits(metadata: str) -> bool:
        has = msgspec.json.decode(metadata) if patterns else {}
        return all(name in has and each.match(plain(has[name])) for name, each in patterns.items())

    return fits


def model_test(glob: str | None, metadata: Mapping[str, str]) -> Callable[[str, str], bool]:
    """Return a test whether a model matches a shell glob, and its prediction's metadata these."""
    pattern = re.compile(translate("*" if glob is None else glob))
    has_metadata = metadata_test(metadata)
    return lambda model, given: pattern.match(model) is not None and has_metadata(given)


class PredictionStore(Repository):
    """The predictions of one store."""

    async def create(self, new: NewPrediction) -> CreateResult:
        return await self._store.write(create, new)

    async def begin_submits(self, budget: SubmitBudget) -> SubmitBatch:
        """Move queued predictions to `submitting`, oldest first, as many as there is room for."""
        return await self._store.write(begin_submits, budget)

    async def mark_sent(self, mark: SendMark) -> bool:
        """Record that a submit is about to be sent; False: another process has it, do not send."""
        return await self._store.write(mark_sent, mark)

    async def progress(self, progress: Progress) -> ProgressResult:
        """Record a step of a living prediction."""
        try:
            return await self._store.write(record_progress, progress)
        except Exception as error:
            if not self._store.is_taken(error):
                raise
            return "taken"

    async def in_flight(self, provider: str, most: int) -> int:
        """Count a provider's predictions in flight, up to `most`."""
        rows = await self._store.read(sql.count_in_flight, provider=provider, max_in_flight=most)
        return int(rows[0]["number"])

    async def claim_due(self, provider: str, now: float, hold_until: float, most: int) -> list[Job]:
        """Take a provider's predictions due for a poll; they are due again at `hold_until`."""
        rows = await self._store.run(
            sql.claim_due, provider=provider, now=now, hold_until=hold_until, most=most
        )
        return [job_of(row) for row in rows]

    async def mark_cancel(self, prediction_id: str) -> None:
        await self._store.run(sql.mark_cancel, id=prediction_id)

    async def job(self, prediction_id: str) -> Job | None:
        rows = await self._store.read(sql.select_job, id=prediction_id)
        return job_of(rows[0]) if rows else None

    async def get(self, prediction_id: str) -> Prediction | None:
        rows = await self._store.read(sql.select_prediction, id=prediction_id)
        return prediction_of(rows[0]) if rows else None

    async def account(self, prediction_id: str) -> str | None:
        """Return the account that the cost of a prediction is added up by, as JSON."""
        rows = await self._store.read(sql.select_account, id=prediction_id)
        return rows[0]["account"] if rows else None

    async def ahead_of(self, provider: str, prediction_id: str) -> int:
        """Count the predictions queued at a provider before this one, up to 1,000."""
        rows = await self._store.read(sql.count_ahead, provider=provider, id=prediction_id)
        return int(rows[0]["number"])

    async def page(self, wanted: PredictionFilter) -> Page[Prediction]:
        """Return a page of predictions, newest first.

        By model or metadata a bounded number is searched: a page may contain fewer than the limit.
        """
        if wanted.model is not None or wanted.metadata:
            return await self._look(wanted)
        rows = await listed(
            self._store,
            sql.lists["list_predictions"],
            database_filters(wanted, wanted.cursor),
            wanted.limit,
        )
        return page_of([prediction_of(row) for row in rows], wanted.limit)

    async def _look(self, wanted: PredictionFilter) -> Page[Prediction]:
        """Search a bounded number of predictions for those that match."""
        fits = model_test(wanted.model, wanted.metadata)
        found: list[tuple[str]] = []
        cursor = wanted.cursor
        scan = sql.lists["scan_predictions"]
        for _ in range(_MOST_SCANS):
            rows = await listed(self._store, scan, database_filters(wanted, cursor), _SCANNED)
            for row in rows:
                if fits(row["model"], row["metadata"]):
                    if len(found) == wanted.limit:
                        return Page(data=await self._whole(found), next_cursor=cursor)
                    found.append((row["id"],))
                cursor = row["id"]
            if len(rows) <= _SCANNED:
                cursor = None
                break
        return Page(data=await self._whole(found), next_cursor=cursor)

    async def _whole(self, found: Sequence[tuple[str]]) -> list[Prediction]:
        rows = await self._store.read(sql.select_predictions, found) if found else []
        return [prediction_of(row) for row in rows]

    async def find(self, provider: str, provider_id: str) -> str | None:
        """Return our id for the provider's."""
        rows = await self._store.read(
            sql.select_id_by_provider_id, provider=provider, provider_id=provider_id
        )
        return rows[0]["id"] if rows else None

    async def next_due(self, provider: str) -> float | None:
        """Return when the next prediction at a provider falls due for a poll."""
        return (await self._store.read(sql.next_due, provider=provider))[0]["due_at"]  # type: ignore[no-any-return]

    async def stale(self, provider: str, before: float, most: int) -> list[str]:
        """Return predictions that have been queued since before `before`."""
        rows = await self._store.read(sql.select_stale, provider=provider, before=before, most=most)
        return [row["id"] for row in rows]

    async def late(self, provider: str, now: float, most: int) -> list[tuple[str, str]]:
        """Return queued predictions that it is too late to submit, and why they were put off.

        It takes its turn among the writes: after a step of the clock, stored times are moved first.
        """
        rows = await self._store.run(sql.select_late, provider=provider, now=now, most=most)
        return [(row["id"], row["last_reason"] or "") for row in rows]

    async def next_late(self, provider: str) -> float | None:
        """Return the first time from which it is too late to submit a queued prediction."""
        rows = await self._store.read(sql.next_queued, provider=provider)
        return rows[0]["latest_at"]  # type: ignore[no-any-return]

    async def hasten(self, provider: str, now: float) -> None:
        """Make every prediction at the provider due for a poll."""
        await self._store.run(sql.expedite_polls, provider=provider, now=now)
