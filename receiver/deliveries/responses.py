"""Turn the HTTP status of another service into success, a retry, or a dead letter."""

from __future__ import annotations

import time
from collections.abc import Container
from typing import Final

import httpx

from receiver.deliveries.handlers import Dead, Retry
from receiver.providers.parsing import seconds_of

_PASSING: Final = frozenset({408, 423, 425, 429})
_FINAL: Final = frozenset(range(300, 500)) - _PASSING
_LONGEST: Final = 200


def expect(
    answer: httpx.Response, *, final: Container[int] = _FINAL, after: float | None = None
) -> httpx.Response:
    """Return a 2xx answer; raise Dead for a status in `final` and Retry for any other.

    By default every 3xx and 4xx is final except 408, 423, 425 and 429. The next attempt comes after
    `after` seconds, else after the answer's Retry-After, else by the handler's policy.
    """
    if answer.is_success:
        return answer
    body = " ".join(answer.text.split())[:_LONGEST]
    reason = f"HTTP {answer.status_code}: {body}" if body else f"HTTP {answer.status_code}"
    if answer.status_code in final:
        raise Dead(reason)
    if after is None:
        after = seconds_of(answer.headers.get("retry-after", ""), time.time())
    # A delay of 0 would spend all attempts within a second: the policy's backoff prevents that.
    raise Retry(reason, after=after or None)
