"""Decorators that make a generator of steps a method of both clients.

The method of a Receiver blocks, that of an AsyncReceiver is awaited.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    NoReturn,
    ParamSpec,
    TypeAlias,
    TypeVar,
    overload,
)

from receiver.client.follow import Message
from receiver.client.steps import Steps

if TYPE_CHECKING:
    from receiver.client import AsyncReceiver, Receiver

P = ParamSpec("P")
T = TypeVar("T")
Messages: TypeAlias = Generator[Message, None, None]


class _Declared(Generic[P, T]):
    """A descriptor that makes a method of a client from one that returns steps."""

    def __init__(self, steps: Callable[Concatenate[Any, P], Steps[T]]) -> None:
        self._steps = steps
        self.__doc__ = steps.__doc__

    def _taken_by(self, client: Any, take: Callable[[Steps[T]], Any]) -> Any:
        def call(*given: P.args, **named: P.kwargs) -> Any:
            return take(self._steps(client, *given, **named))

        call.__doc__ = self.__doc__
        return call


class operation(_Declared[P, T]):  # noqa: N801 - a decorator
    """Make a method of both clients from one that returns steps."""

    @overload
    def __get__(self, client: Receiver, owner: object = None) -> Callable[P, T]: ...
    @overload
    def __get__(
        self, client: AsyncReceiver, owner: object = None
    ) -> Callable[P, Coroutine[Any, Any, T]]: ...
    @overload
    def __get__(self, client: None, owner: object = None) -> operation[P, T]: ...
    def __get__(self, client: Any, owner: object = None) -> Any:
        return self if client is None else self._taken_by(client, client.run)


class stream(_Declared[P, NoReturn]):  # noqa: N801 - a decorator
    """Make an endless iterator of both clients from a method that returns steps."""

    @overload
    def __get__(self, client: Receiver, owner: object = None) -> Callable[P, Messages]: ...
    @overload
    def __get__(
        self, client: AsyncReceiver, owner: object = None
    ) -> Callable[P, AsyncGenerator[Message, None]]: ...
    @overload
    def __get__(self, client: None, owner: object = None) -> stream[P]: ...
    def __get__(self, client: Any, owner: object = None) -> Any:
        return self if client is None else self._taken_by(client, client.iterate)
