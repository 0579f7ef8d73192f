"""The ASGI entry points: `receiver.asgi:app`, configured by the environment, and `mount`."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from receiver.deliveries.registry import Registered
    from receiver.settings import Settings

app: Starlette


def __getattr__(name: str) -> Starlette:
    """Create the app when a server first reads `app`."""
    if name != "app":
        raise AttributeError(f"module 'receiver.asgi' has no attribute {name!r}")
    found = globals()["app"] = create_app()
    return found


def create_app(settings: Settings | None = None) -> Starlette:
    """Build the receiver without importing packages that only terminals need."""
    import_app()
    from receiver.app import create_app as create  # noqa: PLC0415 - see above

    return create(settings)


def import_app() -> None:
    """Import the app without packages that only terminals need.

    httpx and structlog import rich, pygments and click if installed, for a command line and for
    tracebacks in colour: a fifth of the cost to start. Code that needs them imports them later.
    """
    with _without("rich", "click", "pygments"), _uncollected():
        import receiver.app  # noqa: F401, PLC0415 - see above


@contextmanager
def _uncollected() -> Iterator[None]:
    """Disable the garbage collector: each scan of the imported modules takes 60 ms, for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # they are not scanned later either
        if was_on:
            gc.enable()


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Hide modules that were not imported yet, as if they were not installed."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # None: imports fail
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def mount(
    app: Starlette,
    path: str,
    settings: Settings | None = None,
    handlers: Sequence[str | Callable[..., Any] | Registered] | None = None,
    **options: Any,
) -> Starlette:
    """Mount a receiver below `path` of a Starlette or FastAPI app; return it.

    It starts before the app's own lifespan and stops after it. A RECEIVER_PUBLIC_URL without a path
    is the address of the whole app, so `path` is appended for callbacks; one with a path is taken
    as the receiver's own address. The other parameters are those of `create_app`.
    """
    from starlette.routing import Mount  # noqa: PLC0415 - a serverless start does not need it

    from receiver.app import create_app as create  # noqa: PLC0415 - the outer app has its own rich
    from receiver.settings import Settings  # noqa: PLC0415 - likewise

    if not hasattr(getattr(app, "router", None), "lifespan_context"):
        raise TypeError(f"app must be one of Starlette or FastAPI, not {app!r}: see create_app()")
    if path != "" and not str(path).startswith("/"):
        raise ValueError(f"path must begin with a slash, as /predictions does, not {path!r}")
    path = path.rstrip("/")
    for other in app.router.routes:
        if isinstance(other, Mount) and f"{path}/".startswith(f"{other.path}/"):
            raise ValueError(
                f"what is mounted at {other.path or '/'!r} gets all requests for {path or '/'!r}: "
                "mount the receiver before it, or at another path"
            )
    settings = Settings.read(os.environ) if settings is None else settings
    if settings.public_url and not urlsplit(settings.public_url).path:
        settings = replace(settings, public_url=f"{settings.public_url}{path}")
    receiver = create(settings, handlers, **options)
    own = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(outer: Any) -> AsyncIterator[Any]:
        async with receiver.router.lifespan_context(receiver), own(outer) as state:
            yield state

    app.mount(path, receiver)
    app.router.lifespan_context = lifespan
    return receiver
