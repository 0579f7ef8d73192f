"""The authentication of the dashboard: sign-in by a key, a signed cookie, and a token in forms.

The cookie holds the digest of the key, so that a removed key is refused from then on, and the
random name from which the forms' token is made. It is `__Host-`: sent over https only, to this host
only. Over plain http it is sent only in development, on this machine, under another name.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from contextlib import suppress
from typing import Any, Final
from urllib.parse import parse_qsl

import msgspec
from itsdangerous import BadData, Signer, URLSafeSerializer
from starlette.requests import Request
from starlette.responses import Response

from receiver.http.auth import Key, Keys
from receiver.http.body import whole_body
from receiver.http.limits import Limits
from receiver.http.proxies import client_of
from receiver.model.errors import Problem
from receiver.observability.clock import Clock
from receiver.settings import Settings
from receiver.settings.proxies import is_loopback

COOKIE: Final = "__Host-receiver"
DEV_COOKIE: Final = "receiver-dev"
USES: Final = ("all", "read")
"""The uses of keys that may sign in; keys that only read may not act."""
LONGEST: Final = 12 * 3600
"""Seconds that a sign-in lasts."""
_MOST_FIELDS: Final = 200
_SIGNING: Final[dict[str, Any]] = {"key_derivation": "hmac", "digest_method": hashlib.sha256}


class SignedOut(Exception):
    """There is no valid cookie: sign in first."""


class Session(msgspec.Struct, frozen=True):
    """The content of the cookie."""

    key: str
    """The digest of a key; empty before the sign-in."""
    name: str
    """A random name, from which the token of the forms is made."""
    at: int
    """When it began, in unix seconds."""


class Guard:
    """The reader and writer of the cookie, which also checks forms."""

    def __init__(self, settings: Settings, limits: Limits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._dev = settings.dev
        self._longest_body = settings.max_body_bytes
        ours = [key.reveal() for key in reversed(settings.secret_keys)]  # the newest is the last
        self._cookies = URLSafeSerializer(ours, salt="dashboard/cookie", signer_kwargs=_SIGNING)
        self._tokens = Signer(ours, salt="dashboard/form", **_SIGNING)
        self._keys = Keys(settings)
        self._digests = {
            _digest(mine, key): key for mine in ours for key in self._keys.known if key.use in USES
        }
        self._newest = ours[-1]

    @property
    def has_keys(self) -> bool:
        return bool(self._digests)

    def key(self, session: Session) -> Key:
        """Return the key that a session is signed in with, or raise SignedOut."""
        found = self._digests.get(session.key)
        if found is None:
            raise SignedOut
        return found

    def charge(self, request: Request) -> None:
        """Charge a page like a request to /v1 with a valid key, or raise Limited."""
        self._limits.authorized(client_of(request.scope))

    def session(self, request: Request) -> Session:
        """Return the session in the cookie; if it has no valid one, a new one, not signed in."""
        with suppress(BadData, msgspec.ValidationError):
            content = self._cookies.loads(request.cookies.get(self._name(request), ""))
            session = msgspec.convert(content, Session, strict=True)
            if 0 <= self._clock() - session.at < LONGEST:
                return session
        return self._new_session()

    def _new_session(self, key: str = "") -> Session:
        return Session(key, secrets.token_hex(16), int(self._clock()))

    def token(self, session: Session) -> str:
        """Return the token that every form of a session must send."""
        return self._tokens.sign(session.name).decode()

    async def form(self, request: Request, session: Session) -> dict[str, str]:
        """Return the fields of a form; raise Problem unless a page of the session has sent it."""
        site = request.headers.get("sec-fetch-site")
        if site != "same-origin" and (site is not None or not _is_own(request)):
            raise Problem(403, "forbidden", "the form was not sent by one of these pages")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/x-www-form-urlencoded":
            raise Problem(415, "unsupported-media-type", "send a form")
        body = await whole_body(request, self._longest_body)
        try:
            text = body.decode()
            form = dict(parse_qsl(text, keep_blank_values=True, max_num_fields=_MOST_FIELDS))
        except ValueError as error:
            raise Problem(422, "invalid-request", "this is no form") from error
        given = form.pop("token", "").rpartition(".")[2].encode()
        if not hmac.compare_digest(self._tokens.get_signature(session.name), given):
            raise Problem(
                403, "forbidden", "the form is too old, or your browser keeps no cookie of ours"
            )
        return form

    def sign_in(self, request: Request, text: str) -> Session | None:
        """Return a new session for a valid key, or None; raise Limited after too many failures."""
        key = self._keys.admit(self._limits, client_of(request.scope), text.strip(), USES)
        return self._new_session(_digest(self._newest, key)) if key else None

    def set_cookie(self, request: Request, response: Response, session: Session) -> None:
        name = self._name(request)
        response.set_cookie(
            name,
            self._cookies.dumps(msgspec.to_builtins(session)),
            max_age=LONGEST,
            secure=name == COOKIE,
            httponly=True,
            samesite="strict",
        )

    def drop_cookie(self, request: Request, response: Response) -> None:
        name = self._name(request)
        response.delete_cookie(name, secure=name == COOKIE, httponly=True, samesite="strict")

    def is_unsafe(self, request: Request) -> bool:
        """Return whether a browser will refuse our cookie: over http, except in development."""
        return request.url.scheme == "http" and self._name(request) == COOKIE

    def _name(self, request: Request) -> str:
        here = self._dev and request.url.scheme == "http"
        return DEV_COOKIE if here and is_loopback(request.url.hostname or "") else COOKIE


def _is_own(request: Request) -> bool:
    """Return whether the Origin header, if there is one, is ours."""
    origin = request.headers.get("origin")
    return origin is None or origin.partition("://")[2] == request.headers.get("host")


def _digest(secret: str, key: Key) -> str:
    return hmac.new(secret.encode(), b"dashboard/" + key.text, hashlib.sha256).hexdigest()
