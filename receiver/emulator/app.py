"""The emulator's ASGI app: providers, chat platforms, pictures and control routes on one port."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from receiver.emulator import faults, pictures, wire
from receiver.emulator.chats.platforms import Chats
from receiver.emulator.chats.scene import Scene
from receiver.emulator.emulated import Emulated
from receiver.emulator.options import Options
from receiver.emulator.oxen import Oxen
from receiver.emulator.providers import CALLING
from receiver.emulator.world import World


class _Emulator(Starlette):
    """A Starlette app that stores how to close the connection, before any layer wraps it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire.remember_connection(scope, send)
        await super().__call__(scope, receive, send)


def create_emulator(
    options: Options | None = None, now: Callable[[], float] = time.time
) -> Starlette:
    """Return the ASGI app; its background work ends with its lifespan."""
    options = options or Options()
    world = World(options, now)
    oxen = Oxen(world)
    scale = options.time_scale
    chats = Chats(Scene(options.receiver, options.own, now, scale=scale, faults=world.faults))

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        oxen.start()
        try:
            yield
        finally:
            await chats.scene.caller.close()
            await world.close()

    providers: list[Emulated] = [oxen, *(make(world) for make in CALLING.values())]
    offered = [route for provider in providers for route in provider.routes()]
    routes = [*offered, *chats.routes(), *chats.control(), *_control(world)]
    app = _Emulator(
        routes=routes, lifespan=lifespan, exception_handlers={ClientDisconnect: _on_disconnect}
    )
    app.router.redirect_slashes = False
    app.state.chats = chats
    app.state.release = oxen.release
    return app


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    """Answer a client that disconnected during its request, so that no error is logged."""
    return Response(status_code=400)


def settings_for(base_url: str) -> dict[str, str]:
    """Return the environment that points a receiver at an emulator."""
    base = base_url.rstrip("/")
    providers: list[type[Emulated]] = [Oxen, *CALLING.values()]
    given = {name: value for each in providers for name, value in each.settings().items()}
    return {name: base + v if v.startswith("/") else v for name, v in given.items()}


def _control(world: World) -> list[Route]:
    async def put_faults(request: Request) -> Response:
        try:
            world.faults.replace(faults.read_rules(await request.body()))
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            return wire.answer({"error": str(error)}, 400)
        return wire.answer(world.faults.rules)

    async def get_faults(_request: Request) -> Response:
        return wire.answer(world.faults.rules)

    async def delete_faults(_request: Request) -> Response:
        world.faults.replace([])
        return Response(status_code=204)

    async def ledger(request: Request) -> Response:
        limit = request.query_params.get("limit", "")
        return wire.answer(world.ledger.report(int(limit) if limit.isdecimal() else None))

    return [
        Route("/files/{name}", _picture),
        Route("/_emulator/faults", put_faults, methods=["PUT"]),
        Route("/_emulator/faults", get_faults, methods=["GET"]),
        Route("/_emulator/faults", delete_faults, methods=["DELETE"]),
        Route("/_emulator/ledger", ledger, methods=["GET"]),
    ]


async def _picture(request: Request) -> Response:
    if request.path_params["name"].endswith(".mp4"):
        return Response(pictures.FILM, media_type="video/mp4")
    picture = pictures.draw(request.path_params["name"])
    if picture is None:
        return Response(status_code=404)
    return Response(picture, media_type="image/png")
