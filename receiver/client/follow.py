"""The live stream: server-sent events, parsed without I/O, and resumed after a lost connection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final, NoReturn

import httpx
import msgspec

from receiver.client.steps import (
    ClientError,
    Emit,
    OpenStream,
    ReadChunk,
    Request,
    Sleep,
    Steps,
    exchange,
    pauses,
    refusal,
    whole,
)
from receiver.model.answers import Change, DeliveryChange, Gap
from receiver.model.values import Announcement

_PATH: Final = "/v1/events/stream"
_SILENCE: Final = 45.0
"""Seconds without a byte after which a stream counts as lost: keep-alives come every 15."""
ENDS: Final = "succeeded,failed,canceled"
OPEN: Final = "stream.open"
_LONGEST_PLACE: Final = 18
"""Digits of a place in the stream."""
_REFUSED: Final = range(300, 500)
_NOT_NOW: Final = frozenset({408, 429})
_ATTEMPTS: Final = "delivery."
_KINDS: Final[dict[str, type[Announcement | Change | Gap]]] = {
    **{f"prediction.{end}": Announcement for end in ENDS.split(",")},
    "stream.gap": Gap,
}


class Message(msgspec.Struct, frozen=True):
    """One message of the stream."""

    seq: int
    """Its place in the stream: pass it as `after` to continue after it."""
    type: str
    """As in `prediction.succeeded`, or `stream.gap`."""
    body: bytes
    """JSON."""

    @property
    def content(self) -> Announcement | Change | DeliveryChange | Gap:
        """The decoded body. Raises ClientError.

        For the end of a prediction an Announcement, for any other status a Change, for the end of
        a handler's attempt a DeliveryChange, or a Gap: the lists contain what happened in it.
        """
        try:
            return msgspec.json.decode(self.body, type=_kind(self.type))
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise ClientError("no-receiver", f"what answers is not a receiver ({error})") from error


def _kind(name: str) -> type[Announcement | Change | DeliveryChange | Gap]:
    return DeliveryChange if name.startswith(_ATTEMPTS) else _KINDS.get(name, Change)


class Frames:
    """A parser of server-sent events from the chunks of a stream."""

    def __init__(self) -> None:
        self._rest = b""
        self._fields: dict[bytes, bytes] = {}

    def feed(self, chunk: bytes) -> Iterator[Message]:
        """Yield the messages that a chunk completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            name, _, value = line.rstrip(b"\r").partition(b":")
            if name:
                self._fields[name] = value.removeprefix(b" ")
                continue
            if not line.strip():
                fields, self._fields = self._fields, {}
                seq = whole(fields.get(b"id", b"").decode("latin-1"), _LONGEST_PLACE)
                if seq is not None and fields.get(b"data"):
                    kind = fields.get(b"event", b"").decode("utf-8", "replace")
                    yield Message(seq, kind, fields[b"data"])


def current_place(url: str, patience: float) -> Steps[int | None]:
    """Return the place where the stream would begin now."""
    answer = yield from exchange(Request(method="HEAD", path=_PATH), url, patience)
    return whole(answer.headers.get("last-event-id", ""), _LONGEST_PLACE)


def open_stream(params: Mapping[str, str], after: int | str | None, silence: float) -> OpenStream:
    """Return the step that opens the stream after a place; None: from now on."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    return OpenStream(
        Request(method="GET", path=_PATH, params=params, headers=headers, silence=silence)
    )


def follow(
    params: Mapping[str, str], after: int | None, on_loss: Callable[[str], None], url: str
) -> Steps[NoReturn]:
    """Emit every message after a place, for ever; after a lost connection, resume there.

    `on_loss` is called with the reason of each loss. Raises ClientError for an answer 4xx, other
    than 408 and 429.
    """
    pause = pauses()
    last: int | str | None = after
    while True:
        retry_after = 0
        try:
            answer = yield open_stream(params, last, _SILENCE)
            if answer.status == httpx.codes.OK:
                last = answer.headers.get("last-event-id") if last is None else last
                reason = "the receiver ended the stream"
                frames = Frames()
                while chunk := (yield ReadChunk()):
                    for message in frames.feed(chunk):
                        pause = pauses()
                        last = message.seq
                        if message.type != OPEN:
                            yield Emit(message)
            else:
                error = refusal(answer, url) or ClientError("no-receiver", f"HTTP {answer.status}")
                if answer.status in _REFUSED and answer.status not in _NOT_NOW:
                    raise error
                reason, retry_after = str(error), error.retry_after or 0
        except httpx.RequestError as error:
            reason = f"{type(error).__name__}: {error}"
        seconds = max(next(pause), retry_after)
        on_loss(f"{reason}; again in {seconds:g} s")
        yield Sleep(seconds)
