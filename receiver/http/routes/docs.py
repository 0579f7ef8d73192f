"""The routes `/`, `/openapi.json` and `/docs`: the description of this API.

The last two are files, made before the package is built (`make docs`); a test compares them with
the routes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from importlib.resources import files
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from receiver.http.declare import get

_CACHED: Final = {"Cache-Control": "public, max-age=300", "X-Content-Type-Options": "nosniff"}
_HERE: Final = "."
_SERVER: Final = b'"url": "%b"'
"""The first such line of `openapi.json` names its server."""
_ABOUT: Final = """\
A prediction receiver: it submits image and video predictions to their providers, records every
outcome exactly once, and runs handlers on it.

docs          what it takes and answers, for people
openapi.json  the same for programs
health        whether it is alive; ready: whether it can work
"""


class IfNoneMatch(msgspec.Struct, frozen=True, rename={"tags": "If-None-Match"}):
    """The version that the caller has already."""

    tags: str | None = None
    """The ETag of an earlier answer."""


class DocsRoutes:
    """The three routes, which need no key."""

    @get(
        "/",
        {200: "what this is", 303: "to the dashboard: a browser, where there is one"},
        media_type="text/plain",
        is_open=True,
    )
    async def about(self, request: Request) -> Response:
        """Describe this server in a few lines.

        They are for people who open its address.
        """
        headers = {**_CACHED, "Vary": "Accept"}
        if request.app.state.shows_dashboard and "text/html" in request.headers.get("accept", ""):
            return RedirectResponse(f"{request.scope.get('root_path', '')}/ui", 303, headers)
        return Response(_ABOUT, headers=headers, media_type="text/plain")

    @get("/openapi.json", {200: "OpenAPI 3.1", 304: "as it was"}, sends=["ETag"], is_open=True)
    async def openapi(self, request: Request, headers: IfNoneMatch) -> Response:
        """Return the OpenAPI document.

        It is made from the types of requests and answers, and changes only with a new release. Its
        server is RECEIVER_PUBLIC_URL, or if that is not set, the one that it was fetched from.
        """
        server = request.app.state.public_url or _HERE
        return _answer(headers, "openapi.json", "application/json", server)

    @get(
        "/docs",
        {200: "a page", 304: "as it was"},
        sends=["ETag"],
        media_type="text/html",
        is_open=True,
    )
    async def docs(self, headers: IfNoneMatch) -> Response:
        """Return the documentation of this API as a page.

        It is made from the types of requests and answers, and changes only with a new release.
        """
        return _answer(headers, "docs.html", "text/html")


def _answer(known: IfNoneMatch, name: str, media_type: str, server: str = _HERE) -> Response:
    body, headers = _file(name, server)
    tags = re.findall(r'"[^"]*"|\*', known.tags or "")
    if headers["ETag"] in tags or "*" in tags:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=media_type)


@lru_cache(maxsize=4)
def _file(name: str, server: str) -> tuple[bytes, dict[str, str]]:
    """Return a file of this package with its headers; it is read at the first request."""
    body = files("receiver.http").joinpath(name).read_bytes()
    if name.endswith(".json"):
        body = body.replace(_SERVER % _HERE.encode(), _SERVER % server.encode(), 1)
    headers = {**_CACHED, "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"'}
    if name.endswith(".html"):
        headers |= _policy(body)
    return body, headers


def _policy(page: bytes) -> dict[str, str]:
    """Return the headers that let a page use its own style and script, and nothing else."""
    own = "; ".join(f"{tag}-src '{_digest(page, tag)}'" for tag in ("style", "script"))
    return {
        "Content-Security-Policy": f"default-src 'none'; {own}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "Referrer-Policy": "no-referrer",
    }


def _digest(page: bytes, tag: str) -> str:
    """Return the digest of the content of the page's only such tag."""
    _, _, after = page.partition(f"<{tag}>".encode())
    text, _, _ = after.partition(f"</{tag}>".encode())
    return f"sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}"
