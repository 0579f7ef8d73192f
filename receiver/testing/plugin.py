"""The pytest plugin: the fixture `receiver_kit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from receiver.testing.kit import Kit


@pytest.fixture
def receiver_kit() -> Iterator[Callable[..., Kit]]:
    """Create receivers for handlers, as `Kit` does; they are stopped when the test ends.

    Log lines below a warning are not printed, unless structlog is configured already.
    """
    from receiver.testing.kit import Kit  # noqa: PLC0415 - only tests that use it pay for it
    from receiver.testing.logs import warnings_only  # noqa: PLC0415 - the same

    with warnings_only(), ExitStack() as kits:

        def make(*handlers: Callable[..., Any] | str, **given: Any) -> Kit:
            return kits.enter_context(Kit(*handlers, **given))

        yield make
