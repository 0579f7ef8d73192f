"""Rows to values: the order of columns here is that of the queries."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import msgspec

from receiver.model.values import (
    Announcement,
    Error,
    Event,
    Output,
    Prediction,
    Status,
    Ticket,
    utc,
)
from receiver.store.values import AttemptRecord, Claim, Delivery, Job, Page


def job(row: Sequence[Any]) -> Job:
    (
        prediction_id,
        provider,
        model,
        mode,
        status,
        input_text,
        provider_id,
        links,
        submitted_at,
        cancel_requested,
        submits,
        polls,
        created_at,
        deadline_at,
    ) = row
    return Job(
        ticket=Ticket(
            id=prediction_id,
            model=model,
            mode=mode,
            input=msgspec.json.decode(input_text),
            provider_id=provider_id,
            links=msgspec.json.decode(links),
            submitted_at=submitted_at,
            cancel_requested=bool(cancel_requested),
        ),
        provider=provider,
        status=Status(status),
        submits=submits,
        polls=polls,
        created_at=created_at,
        deadline_at=deadline_at,
    )


def prediction(row: Sequence[Any]) -> Prediction:
    (
        prediction_id,
        provider,
        model,
        status,
        mode,
        input_text,
        metadata,
        provider_id,
        output,
        error_code,
        error_message,
        channel,
        parent_id,
        depth,
        created_at,
        submitted_at,
        completed_at,
        erased_at,
    ) = row
    return Prediction(
        id=prediction_id,
        provider=provider,
        model=model,
        status=Status(status),
        mode=mode,
        input=msgspec.json.decode(input_text),
        metadata=msgspec.json.decode(metadata),
        provider_id=provider_id,
        output=None if output is None else msgspec.json.decode(output, type=list[Output]),
        error=Error(code=error_code, message=error_message) if error_code else None,
        channel=channel,
        parent_id=parent_id,
        depth=depth,
        created_at=utc(created_at),
        submitted_at=None if submitted_at is None else utc(submitted_at),
        completed_at=None if completed_at is None else utc(completed_at),
        erased_at=None if erased_at is None else utc(erased_at),
    )


def delivery(row: Sequence[Any]) -> Delivery:
    *head, created_at, due_at, ended_at, history = row
    names = (
        "id",
        "event_id",
        "prediction_id",
        "handler",
        "state",
        "attempts",
        "round",
        "replay_id",
        "reason",
    )
    return Delivery(
        **dict(zip(names, head, strict=True)),
        created_at=rfc3339(created_at),
        due_at=None if due_at is None else rfc3339(due_at),
        ended_at=None if ended_at is None else rfc3339(ended_at),
        history=[
            AttemptRecord(
                **attempt | {name: rfc3339(attempt[name]) for name in ("started_at", "ended_at")}
            )
            for attempt in sorted(msgspec.json.decode(history or "[]"), key=itemgetter("number"))
        ],
    )


def rfc3339(seconds: float) -> str:
    return utc(seconds).isoformat().replace("+00:00", "Z")


def page(rows: list[Any], limit: int) -> Page[Any]:
    more = len(rows) > limit
    data = rows[:limit]
    return Page(data=data, next_cursor=data[-1].id if more else None)


def claimed(row: Sequence[Any], handler: str) -> Claim:
    delivery_id, attempt, rounds, number, event_id, kind, time, channel, *rest, raw = row
    return Claim(
        id=delivery_id,
        handler=handler,
        attempt=attempt,
        round=rounds,
        number=number,
        event=Event(
            id=event_id,
            type=kind,
            time=utc(time),
            channel=channel,
            prediction=prediction(rest),
            raw=None if raw is None else _payload(raw),
        ),
    )


def announcement(row: Sequence[Any]) -> Announcement:
    name, kind, time, channel, *rest = row
    return Announcement(
        id=name, type=kind, time=utc(time), channel=channel, prediction=prediction(rest)
    )


def _payload(body: str | bytes) -> Any:
    """Decode what a provider sent; a refusal may be a web page, and is given as it is."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return body if isinstance(body, str) else _text(body)


def _text(body: bytes) -> str | None:
    """Give bytes that are text as text; others mean nothing to a handler."""
    try:
        return None if b"\0" in body else body.decode()
    except UnicodeDecodeError:
        return None
