import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
import pytest

from receiver.emulator import create_emulator
from tests.emulator.serving import FAST, Emulated, Mailbox, PostOffice, Server, serve

Start = Callable[..., Emulated]


@pytest.fixture(scope="session")
def stopping() -> Iterator[list[Server]]:
    """Collect servers that are stopping, so that only the end of the session waits for them."""
    servers: list[Server] = []
    yield servers
    for server in servers:
        server.stop()


@pytest.fixture
def start(stopping: list[Server]) -> Iterator[Start]:
    """Start emulators with the options a test needs."""
    with ExitStack() as stack:

        def start(clock: Callable[[], float] = time.time, **options: Any) -> Emulated:
            app = create_emulator(msgspec.structs.replace(FAST, **options), clock)
            server = Server(app)
            stopping.append(server)
            stack.callback(server.ask_to_stop)
            emulated = Emulated(server.port)
            stack.enter_context(emulated.http)
            return emulated

        yield start


@pytest.fixture
def emulated(start: Start) -> Emulated:
    return start()


@pytest.fixture(scope="session")
def post_office() -> Iterator[PostOffice]:
    office = PostOffice()
    with serve(office, lifespan="off") as office.port:
        yield office


@pytest.fixture
def mailbox(post_office: PostOffice) -> Mailbox:
    return post_office.open()
