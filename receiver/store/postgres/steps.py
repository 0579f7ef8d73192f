"""The runner of a transaction's steps on a connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from receiver.store.postgres.group_commit import Connection
from receiver.store.postgres.notices import CHANNEL, Notices
from receiver.store.statement import Cells, Row, Run, Statement, Steps, Write, together

if TYPE_CHECKING:  # PgQueuer takes long to import, and is not needed to accept
    from receiver.store.postgres.queue import PgQueuerJobs

Result = TypeVar("Result")


class StepRunner:
    """Runs steps, and passes their news to the queue's jobs and to other processes."""

    def __init__(self, jobs: PgQueuerJobs, notices: Notices) -> None:
        self._jobs = jobs
        self._notices = notices

    async def drive(self, cx: Connection, steps: Steps[Sequence[Result]]) -> Sequence[Result]:
        """Run all steps in the connection's transaction; return their results."""
        try:
            step = next(steps)
            while True:
                if isinstance(step, Run):
                    step = steps.send(await run(cx, step))
                else:
                    await self._write(cx, step)
                    step = steps.send([])
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    async def _write(self, cx: Connection, step: Write) -> None:
        queries = tuple(statement for statement, _ in step.parts)
        values = [column for statement, rows in step.parts for column in columns(statement, rows)]
        if step.news is None:
            if queries:
                await cx.execute(together(queries, notify=False), *values)
            return
        first, *more = self._notices.of_commit(step.news)
        await cx.execute(together(queries, notify=True), CHANNEL, first, *values)
        for text in more:
            await notify(cx, text)
        if step.news.pending:
            await self._jobs.put(cx, step.news.pending)
        if step.news.dropped:
            await self._jobs.drop(cx, step.news.dropped)


async def notify(cx: Connection, text: str) -> None:
    """Send a notice to all listeners, at the commit."""
    await cx.execute(together((), notify=True), CHANNEL, text)


async def run(cx: Connection, step: Run) -> list[Row]:
    """Run one statement; return its rows."""
    statement, params, rows = step
    arguments = values(statement, params) + columns(statement, rows)
    return await cx.fetch(statement.postgres, *arguments)  # type: ignore[return-value]


def values(statement: Statement, params: Mapping[str, Any]) -> list[Any]:
    """Return the values that a statement names, in its order."""
    return [_storable(params[name]) for name in statement.names]


def columns(statement: Statement, rows: Sequence[Cells] | None) -> list[Any]:
    """Return the columns of the rows that a statement is given, each as an array."""
    if not rows:
        return [[] for _ in statement.columns]
    return [[_storable(cell) for cell in column] for column in zip(*rows, strict=True)]


def _storable(value: Any) -> Any:
    """Return a text without NUL, which PostgreSQL cannot store and strangers may send."""
    return value.replace("\0", "\ufffd") if isinstance(value, str) and "\0" in value else value
