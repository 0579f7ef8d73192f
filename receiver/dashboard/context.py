"""The context of one page request, for pages and templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote, urlencode

from starlette.requests import Request

from receiver.dashboard.guard import Session
from receiver.http.auth import Key

UI: Final = "/ui"
MENU: Final = (
    ("/", "Overview"),
    ("/predictions", "Predictions"),
    ("/deliveries", "Dead letters"),
    ("/handlers", "Handlers"),
    ("/replays", "Replays"),
    ("/discarded", "Discarded"),
    ("/recipes", "Recipes"),
    ("/costs", "Costs"),
)


class PageContext:
    """The signed-in caller, the query, and the values of links and forms."""

    def __init__(
        self,
        request: Request,
        now: float,
        key: Key | None = None,
        session: Session | None = None,
        token: str = "",
    ) -> None:
        self.request = request
        self.key = key
        self.session = session
        self.token = token
        """The token that each form sends back."""
        self.now = now
        self.place = 0
        """The place in the change log when the page was made; its stream begins there."""
        self.form: Mapping[str, str] = {}
        self.done = request.query_params.get("done", "")
        """The name of the action that was just done."""
        self._base = str(request.scope.get("root_path", ""))

    menu = MENU

    @property
    def may_act(self) -> bool:
        return self.key is not None and self.key.use == "all"

    @property
    def query(self) -> Mapping[str, str]:
        return self.request.query_params

    @property
    def caller(self) -> str:
        """The name of the key, for costs and limits by key; empty if it has none."""
        return (self.key.name if self.key else None) or ""

    @property
    def page(self) -> str:
        """The path of this page below `/ui`."""
        path = str(self.request.scope["path"]).removeprefix(self._base)
        return path.removeprefix(UI) or "/"

    @property
    def here(self) -> str:
        """The path and query of this page below `/ui`, to come back to."""
        kept = [each for each in self.request.query_params.multi_items() if each[0] != "done"]
        return self.page + (f"?{urlencode(kept)}" if kept else "")

    @property
    def address(self) -> str:
        """The address of this page."""
        return self._base + UI + self.here

    def is_under(self, path: str) -> bool:
        """Return whether this page is at a path of the menu, or below it."""
        return self.page == path or (path != "/" and self.page.startswith(f"{path}/"))

    def without(self, *names: str) -> dict[str, str]:
        """Return the query without some of its parameters."""
        return {name: value for name, value in self.query.items() if name not in names}

    def has_any(self, *names: str) -> bool:
        return any(self.query.get(name) for name in names)

    def to(self, path: str, **query: Any) -> str:
        """Return the address of a page below `/ui`."""
        return self.with_query(path, {name: value for name, value in query.items() if value})

    def with_query(self, path: str, query: Mapping[str, Any]) -> str:
        return quote(self._base + UI + path) + (f"?{urlencode(query)}" if query else "")

    def back_to(self, path: str, done: str) -> str:
        """Return the address after an action: a form's path below `/ui`, or else the overview."""
        bare, _, query = path.partition("?")
        if not bare.startswith("/") or "//" in bare or "\\" in bare or not bare.isprintable():
            bare, query = "/", ""
        done_part = f"done={quote(done)}" if done else ""
        query = "&".join(filter(None, [query, done_part]))
        return quote(self._base + UI + bare) + (f"?{quote(query, safe='=&%+')}" if query else "")
