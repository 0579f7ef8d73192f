"""The pages to sign in by a key, and to sign out."""

from __future__ import annotations

import structlog
from starlette.responses import RedirectResponse, Response

from receiver.dashboard.context import PageContext
from receiver.dashboard.declare import View, action, page
from receiver.dashboard.guard import Guard
from receiver.http.proxies import client_of

log = structlog.get_logger("receiver")


class SignInPages:
    """The pages to sign in and out."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard

    @page("/sign-in", is_open=True)
    async def sign_in_form(self, context: PageContext) -> View:
        return self._form(context, context.query.get("next", ""))

    @action("/sign-in", "sign in", is_open=True)
    async def sign_in(self, context: PageContext) -> View | Response:
        session = self._guard.sign_in(context.request, context.form.get("key", ""))
        client = client_of(context.request.scope)
        if session is None:
            log.warning("dashboard.action", action="sign in", client=client, result="unauthorized")
            return self._form(context, context.form.get("next", ""), is_wrong=True)
        log.info("dashboard.action", action="sign in", client=client, result="done")
        response = RedirectResponse(context.back_to(context.form.get("next", "/"), ""), 303)
        self._guard.set_cookie(context.request, response, session)
        return response

    @action("/sign-out", "sign out", is_open=True)
    async def sign_out(self, context: PageContext) -> Response:
        response = RedirectResponse(context.to("/sign-in"), 303)
        self._guard.drop_cookie(context.request, response)
        return response

    def _form(self, context: PageContext, after: str, *, is_wrong: bool = False) -> View:
        values = {
            "after": after,
            "is_wrong": is_wrong,
            "is_unsafe": self._guard.is_unsafe(context.request),
            "has_keys": self._guard.has_keys,
        }
        return View("sign_in.html", values, 401 if is_wrong else 200)
