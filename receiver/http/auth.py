"""What stands before every /v1 route: a key."""

from __future__ import annotations

import codecs
import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.http.body import whole_body
from receiver.http.limits import Limits
from receiver.http.proxies import client_of
from receiver.model.errors import Problem
from receiver.settings import Settings

_UNGUESSABLE: Final = 20
"""Characters from which on a key cannot be guessed, however often one may try."""


class Guard:
    """Makes routes that want a key, and reads their bodies within bounds."""

    def __init__(self, settings: Settings, limits: Limits) -> None:
        self._settings = settings
        self._limits = limits
        self._keys = [key.reveal().encode() for key in settings.api_keys]
        self._keys_of_cron = [key.reveal().encode() for key in settings.cron_secrets]

    def route(
        self,
        path: str,
        methods: Mapping[str, Callable[[Request], Awaitable[Response]]],
        *,
        is_open: bool = False,
        is_for_cron: bool = False,
    ) -> Route:
        """Make the route of a path; one that `is_open` needs no key.

        For one that `is_for_cron` a key is good too that is good for nothing else.
        """
        keys = self._keys + (self._keys_of_cron if is_for_cron else [])

        async def answer(request: Request) -> Response:
            if not is_open:
                self._authorize(request, keys)
            return await methods["GET" if request.method == "HEAD" else request.method](request)

        return Route(path, answer, methods=list(methods))

    def _authorize(self, request: Request, keys: Sequence[bytes]) -> None:
        """Let in a caller that has a key; raise Problem, or Limited where too many have not.

        While an address has no more failures left a key that could be guessed is as good as none.
        """
        client = client_of(request.scope)
        shortest = _UNGUESSABLE if self._limits.strangers_wait(client) else 1
        if _is_known(request, keys, shortest):
            self._limits.authorized(client)
            return
        self._limits.unauthorized(client)
        raise Problem(
            401, "unauthorized", "send Authorization: Bearer with one of RECEIVER_API_KEYS"
        )

    async def body(self, request: Request) -> bytes:
        """Read a JSON body, without the mark that some programs put before it."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(415, "unsupported-media-type", "send Content-Type: application/json")
        codings = ",".join(request.headers.getlist("content-encoding")).strip().lower()
        if codings not in {"", "identity"}:
            said = f"send the body as it is, not in Content-Encoding: {codings[:40]}"
            raise Problem(415, "unsupported-media-type", said)
        body = await whole_body(request, self._settings.max_body_bytes)
        return body.removeprefix(codecs.BOM_UTF8)


def _is_known(request: Request, keys: Sequence[bytes], shortest: int) -> bool:
    given = request.headers.get("authorization", "")
    scheme, _, text = given.partition(" ")
    key = text.strip().encode("utf-8", "surrogateescape")
    # Every key is compared, so that the time taken does not tell which one was nearly right.
    known = any([hmac.compare_digest(key, mine) for mine in keys])  # noqa: C419
    return scheme.lower() == "bearer" and known and len(key) >= shortest
