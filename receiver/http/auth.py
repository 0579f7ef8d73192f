"""Authentication and authorization of /v1: API keys, and what each may do."""

from __future__ import annotations

import codecs
from collections.abc import Awaitable, Callable, Collection
from hmac import compare_digest
from typing import Final, Literal, NamedTuple, TypeAlias

from starlette.requests import Request
from starlette.responses import Response

from receiver.http.body import whole_body
from receiver.http.limits import Limits
from receiver.http.proxies import client_of
from receiver.http.request_log import about
from receiver.model.errors import Problem, Unproved
from receiver.model.requests import refuse_coding
from receiver.settings import Settings

Answer: TypeAlias = Callable[[Request], Awaitable[Response]]

_UNGUESSABLE: Final = 20
"""Characters from which on a key cannot be guessed by any number of tries."""


class Key(NamedTuple):
    """A configured key, and its permitted use."""

    text: bytes
    name: str | None
    use: Literal["all", "read", "drain"]


class Keys:
    """All configured keys."""

    def __init__(self, settings: Settings) -> None:
        self.known = [
            *(Key(key.reveal().encode(), key.name, "all") for key in settings.api_keys),
            *(Key(key.reveal().encode(), key.name, "read") for key in settings.viewer_keys),
            *(Key(key.reveal().encode(), None, "drain") for key in settings.cron_secrets),
        ]

    def admit(self, limits: Limits, client: str, text: str, uses: Collection[str]) -> Key | None:
        """Return a caller's key if it is for one of `uses`, else None; raise Limited.

        While an address has no more failures left, a key that could be guessed is refused.
        """
        shortest = _UNGUESSABLE if limits.failure_wait(client) else 1
        key = self._find(text)
        if key is None or len(key.text) < shortest or key.use not in uses:
            limits.unauthorized(client)
            return None
        limits.authorized(client)
        return key

    def _find(self, text: str) -> Key | None:
        """Return the key with this text, or None; its duration does not reveal a near match."""
        given = text.encode("utf-8", "surrogateescape")
        same = [compare_digest(given, key.text) for key in self.known]
        return next((key for key, is_it in zip(self.known, same, strict=True) if is_it), None)


class Guard:
    """The guard of routes that need a key, which also limits the size of their bodies."""

    def __init__(self, settings: Settings, limits: Limits) -> None:
        self._settings = settings
        self._limits = limits
        self._keys = Keys(settings)

    def guarded(
        self, answer: Answer, uses: Collection[str], proof: Callable[[Request], None] | None
    ) -> Answer:
        """Return an answer that needs a key for one of `uses`, if there are any, and a `proof`."""

        async def admitted(request: Request) -> Response:
            if uses:
                self._authorize(request, uses)
            try:
                if proof is not None:
                    proof(request)
                return await answer(request)
            except Unproved as error:
                about(request.scope, verdict="rejected", reason=error.reason)
                self._limits.unauthorized(client_of(request.scope))
                raise Problem(401, "unproved", "this call could not be proved") from None

        return admitted

    def _authorize(self, request: Request, uses: Collection[str]) -> None:
        """Raise Problem or Limited unless the caller's key is for one of `uses`."""
        client = client_of(request.scope)
        key = self._keys.admit(self._limits, client, _bearer(request), {*uses, "read"})
        if key is None:
            message = "send Authorization: Bearer with one of RECEIVER_API_KEYS"
            raise Problem(401, "unauthorized", message)
        if key.use not in uses:
            raise Problem(403, "read-only", "this key is read-only")
        request.state.key = key.name

    async def body(self, request: Request) -> bytes:
        """Return a JSON body, without the byte order mark that some programs put before it."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(415, "unsupported-media-type", "send Content-Type: application/json")
        refuse_coding(",".join(request.headers.getlist("content-encoding")))
        body = await whole_body(request, self._settings.max_body_bytes)
        return body.removeprefix(codecs.BOM_UTF8)


def _bearer(request: Request) -> str:
    """Return the bearer token of a request, or an empty text."""
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    return text.strip() if scheme.lower() == "bearer" else ""
