"""The protocol of a provider adapter, and the values that it takes and returns.

An adapter does no I/O. It turns values into unsent requests and bytes into values:

    request(ticket, hook)      the submit            accepted(ticket, answer)  -> Receipt
    authenticate(callback, …)  proof or Unproved     read(body)                -> Outcome
    poll(ticket)               the poll              polled(ticket, answer)    -> Outcome | Follow
    try_key()                  a harmless request    key_works(answer)         -> bool | None
    search(ticket)             for a lost submit,    found(ticket, answer)     -> Found
                               if supported

`declared` describes a provider's settings, and deploy/providers.md how to add a provider.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Literal, Protocol, runtime_checkable

import httpx
import msgspec

from receiver.model.errors import Unproved
from receiver.model.values import ErrorCode, Outcome, Ticket

Network = IPv4Network | IPv6Network
Proof = Literal["public_keys", "account_secret", "prediction_secret", "capability", "none"]
"""How a callback is proved to come from its provider:

- `public_keys`: a signature; the keys are fetched (see Publishing) and fetched again if it is bad;
- `account_secret`: a signature with the account's secret, which is configured, or fetched like
  keys;
- `prediction_secret`: the secret that we sent with the submit, or a signature with it;
- `capability`: only our own token in the path, so an outcome is polled before it counts;
- `none`: the provider sends no callbacks.
"""


class Callback(msgspec.Struct, frozen=True):
    """The raw request of a callback, not yet proved."""

    headers: Sequence[tuple[bytes, bytes]]
    """Names in lower case, as ASGI gives them."""
    body: bytes
    at: float
    """Unix seconds of its arrival."""
    client: str = ""
    """The address of the sender, for the log."""
    request: str = ""
    """The id of the request, for the log."""

    def header(self, name: bytes) -> bytes:
        """Return the single value of a header; raise Unproved if it is missing or repeated."""
        values = [value for key, value in self.headers if key == name]
        if len(values) != 1:
            raise Unproved("missing_header" if not values else "repeated_header")
        return values[0]


class ProviderResponse(msgspec.Struct, frozen=True):
    """A provider's complete HTTP answer."""

    status: int
    headers: Mapping[str, str]
    """Any mapping with case-insensitive names, such as httpx's."""
    body: bytes
    at: float = 0.0


class CallbackTarget(msgspec.Struct, frozen=True):
    """The URL and the secret for a provider's callback."""

    url: str
    secret: str


class Accepted(msgspec.Struct, frozen=True):
    """The provider accepted the submit and returned its id."""

    provider_id: str
    links: dict[str, str] = {}
    cost: int | None = None
    """Microdollars; None if the answer has no cost."""


class Refused(msgspec.Struct, frozen=True):
    """The provider will never accept this submit; `message` is in its own words."""

    message: str
    code: ErrorCode = "rejected"
    """`content_policy` if it refuses the requested content, not the form of the request."""


class Postponed(msgspec.Struct, frozen=True):
    """The provider did not accept the submit now; `after` is the requested wait in seconds."""

    message: str
    after: float | None = None
    whole_provider: bool = False
    """True if it is about all our requests (429), so that the others should wait too."""
    holds: Literal["full", "locked"] | None = None
    """Why all submits wait, while other requests continue. `full`: until one of our predictions
    ends. `locked`: the account is locked until a person resolves it."""


class Ambiguous(msgspec.Struct, frozen=True):
    """It is not known whether the provider accepted the submit."""

    message: str


Receipt = Accepted | Refused | Postponed | Ambiguous | Outcome


class Follow(msgspec.Struct, frozen=True):
    """The answer to a poll is not enough: send this request too, and `read` its answer."""

    request: httpx.Request
    read: Callable[[Ticket, ProviderResponse], Outcome]


@runtime_checkable
class Provider(Protocol):
    """The adapter of a provider, in one file per provider."""

    @property
    def name(self) -> str: ...
    @property
    def proof(self) -> Proof:
        """Which `keys` the method `authenticate` needs."""

    def check(self, model: str, input: dict[str, Any]) -> None:
        """Raise Problem for a submit that can never work."""

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request: ...
    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt: ...
    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> str | None:
        """Return the provider's id if the proof covers it, else None; raise Unproved."""

    def read(self, body: bytes) -> Outcome: ...
    def poll(self, ticket: Ticket) -> httpx.Request: ...
    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome | Follow: ...
    def try_key(self) -> httpx.Request:
        """Return a free request that changes nothing and needs a valid key."""

    def key_works(self, answer: ProviderResponse) -> bool | None:
        """Return whether the key was accepted; None if the answer does not show it."""


@runtime_checkable
class Stopping(Protocol):
    """A provider that can cancel an accepted prediction."""

    def cancel(self, ticket: Ticket) -> httpx.Request: ...


@runtime_checkable
class Describing(Protocol):
    """A provider that describes its models, one by one."""

    def details(self, model: str) -> httpx.Request | None:
        """Return a request for a model's description; None if the name cannot have one."""


@runtime_checkable
class Streamed(Protocol):
    """A provider that sends outcomes on an event stream instead of calling back."""

    def stream(self) -> httpx.Request: ...
    def streamed(self, event: str, data: str) -> Outcome | None: ...


class Candidate(msgspec.Struct, frozen=True):
    """A prediction at the provider that an ambiguous submit may have made."""

    provider_id: str
    callback_url: str | None = None
    """The URL of its callback: our token in it decides. None if the provider does not report it:
    the adapter has then compared the input and the time."""


class Found(msgspec.Struct, frozen=True):
    """One page of the results of a search."""

    candidates: Sequence[Candidate]
    """In the order in which to try them: the oldest first."""
    more: httpx.Request | None = None
    """The request for the next page; None if no further page can contain it."""


@runtime_checkable
class Searched(Protocol):
    """A provider that can be searched for a submit that got no answer."""

    def search(self, ticket: Ticket) -> Sequence[httpx.Request]:
        """Return requests that list what the provider may have accepted."""

    def found(self, ticket: Ticket, answer: ProviderResponse) -> Found:
        """Read a page, or raise Unreadable; a page without our submit proves nothing."""


@runtime_checkable
class Billing(Protocol):
    """A provider that reports the costs of predictions on request, after their end."""

    @property
    def bills_after(self) -> float | None:
        """Seconds after an end at which it can be asked; None: not with the configured keys."""

    @property
    def most_billed(self) -> int:
        """The most predictions that one request can ask about."""

    def bill(self, tickets: Sequence[Ticket]) -> httpx.Request:
        """Return a request for the costs of ended predictions."""

    def billed(self, tickets: Sequence[Ticket], answer: ProviderResponse) -> dict[str, int]:
        """Return the reported costs in microdollars, by ticket id, or raise Unreadable."""


@runtime_checkable
class Metered(Protocol):
    """A provider that reports the billable units of a result, and the price of a unit."""

    @property
    def metered_after(self) -> float | None:
        """Seconds after an end at which it can be asked; None: not with the configured keys."""

    def price(self, model: str) -> httpx.Request:
        """Return a request for the price of a model's unit."""

    def priced(self, model: str, answer: ProviderResponse) -> float | None:
        """Return US dollars, None if the answer has no price, or raise Unreadable."""

    def meter(self, ticket: Ticket) -> httpx.Request:
        """Return a request for the units of a result."""

    def metered(self, answer: ProviderResponse) -> float | None:
        """Return the units, None if the answer has none, or raise Unreadable."""


@runtime_checkable
class Publishing(Protocol):
    """A provider that hands out the keys that prove its callbacks."""

    def keys(self) -> httpx.Request:
        """Return a request for its public keys, or for its account's secret."""

    def read_keys(self, body: bytes) -> list[bytes]:
        """Return the keys for `authenticate`, or raise Unreadable."""


@runtime_checkable
class Addressing(Protocol):
    """A provider whose description of a model gives the path of its blocking submits."""

    def details(self, model: str) -> httpx.Request: ...
    def addressed(self, ticket: Ticket, answer: ProviderResponse) -> Ticket | Refused | Postponed:
        """Read the description: return the ticket with that path among its links."""


@runtime_checkable
class Guarding(Protocol):
    """A provider with results that can only be fetched with our key."""

    def authorization(self, url: str) -> str | None:
        """Return the Authorization for a result; None for a URL that must not receive it."""


def can_prove(provider: Provider, secrets: Collection[object]) -> bool:
    """Return whether callbacks can be proved with the configured secrets of the account."""
    if provider.proof != "account_secret":
        return provider.proof != "none"
    return bool(secrets) or isinstance(provider, Publishing)
