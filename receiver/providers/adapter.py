"""The protocol of a provider adapter, and the values that it takes and gives.

An adapter does no I/O. It turns values into unsent requests and bytes into values:

    request(ticket, hook)      the submit            accepted(ticket, answer)  -> Receipt
    authenticate(callback, …)  proof or Unproved     read(body)                -> Outcome
    poll(ticket)               how to ask            polled(ticket, answer)    -> Outcome | Follow
    try_key()                  a harmless question    key_works(answer)        -> bool | None
    search(ticket)             where it can be asked  found(ticket, answer)    -> Found
                               for a lost submit

What more there is to say of a provider before it is set is in `declared`, and how to add one in
deploy/providers.md.
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
"""What makes a callback its provider's:

- `public_keys`: a signature; the keys are fetched (see Publishing) and fetched again if it is bad;
- `account_secret`: a signature with the account's secret, which is set, or fetched like keys;
- `prediction_secret`: a signature or a secret by what we sent with the submit;
- `capability`: nothing but our own token in its path, so an outcome is asked for before it counts;
- `none`: it calls nobody back.
"""


class Callback(msgspec.Struct, frozen=True):
    """The raw request a provider sent us; nothing of it is believed yet."""

    headers: Sequence[tuple[bytes, bytes]]
    """Names in lower case, as ASGI gives them."""
    body: bytes
    at: float
    """Unix seconds of its arrival."""
    client: str = ""
    """Whose address it came from, for the log."""
    request: str = ""
    """The name of its request, for the log."""

    def header(self, name: bytes) -> bytes:
        """Return the one value of a header; missing or repeated is Unproved."""
        values = [value for key, value in self.headers if key == name]
        if len(values) != 1:
            raise Unproved("missing_header" if not values else "repeated_header")
        return values[0]


class ProviderResponse(msgspec.Struct, frozen=True):
    """A provider's HTTP answer, whole."""

    status: int
    headers: Mapping[str, str]
    """Any mapping that finds names in any case, as httpx's does."""
    body: bytes
    at: float = 0.0


class CallbackTarget(msgspec.Struct, frozen=True):
    """Where and with what secret a provider should call back."""

    url: str
    secret: str


class Accepted(msgspec.Struct, frozen=True):
    """The provider took the submit and named it."""

    provider_id: str
    links: dict[str, str] = {}
    cost: int | None = None
    """Millionths of a US dollar, where the answer says it."""


class Refused(msgspec.Struct, frozen=True):
    """The provider will never take this submit; `message` is in its own words."""

    message: str
    code: ErrorCode = "rejected"
    """`content_policy` where it refuses what was asked for, not how."""


class Postponed(msgspec.Struct, frozen=True):
    """The provider took nothing now; `after` is the wait it asked for, in seconds."""

    message: str
    after: float | None = None
    whole_provider: bool = False
    """True where it speaks of all our requests (429), so that the others should wait too."""
    holds: Literal["full", "locked"] | None = None
    """What it means for all submits, while other requests go on. `full`: there is room once one of
    ours has ended. `locked`: it takes none of this account's until a person has seen to that."""


class Ambiguous(msgspec.Struct, frozen=True):
    """It is not known whether the provider took the submit."""

    message: str


Receipt = Accepted | Refused | Postponed | Ambiguous | Outcome


class Follow(msgspec.Struct, frozen=True):
    """The answer to a poll is not the whole truth: send this request, and `read` its answer."""

    request: httpx.Request
    read: Callable[[Ticket, ProviderResponse], Outcome]


@runtime_checkable
class Provider(Protocol):
    """One file per provider implements this."""

    @property
    def name(self) -> str: ...
    @property
    def proof(self) -> Proof:
        """What `authenticate` wants as `keys`."""

    def check(self, model: str, input: dict[str, Any]) -> None:
        """Refuse, with a Problem, what could never work."""

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request: ...
    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt: ...
    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> str | None:
        """Raise Unproved, or give the provider's id that the proof itself covers, if it does."""

    def read(self, body: bytes) -> Outcome: ...
    def poll(self, ticket: Ticket) -> httpx.Request: ...
    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome | Follow: ...
    def try_key(self) -> httpx.Request:
        """Return a free request that changes nothing and needs a good key."""

    def key_works(self, answer: ProviderResponse) -> bool | None:
        """Return whether the key was let in; None: the answer does not tell."""


@runtime_checkable
class Stopping(Protocol):
    """A provider with a call that stops what it has taken."""

    def cancel(self, ticket: Ticket) -> httpx.Request: ...


@runtime_checkable
class Describing(Protocol):
    """A provider that describes its models, one by one."""

    def details(self, model: str) -> httpx.Request | None:
        """Return a request for a model's description; None: a name that it has none for."""


@runtime_checkable
class Streamed(Protocol):
    """A provider that sends outcomes on an event stream instead of calling back."""

    def stream(self) -> httpx.Request: ...
    def streamed(self, event: str, data: str) -> Outcome | None: ...


class Candidate(msgspec.Struct, frozen=True):
    """What an ambiguous submit may have made at the provider."""

    provider_id: str
    callback_url: str | None = None
    """Where the provider calls back for it: our token in it decides. None: it does not say, so the
    adapter has compared what was asked for, and when."""


class Found(msgspec.Struct, frozen=True):
    """One page of what a search has found."""

    candidates: Sequence[Candidate]
    """In the order in which they are to be tried: the oldest first."""
    more: httpx.Request | None = None
    """For the next page; None: there is none that could hold it."""


@runtime_checkable
class Searched(Protocol):
    """A provider at which a submit that got no answer can be looked for."""

    def search(self, ticket: Ticket) -> Sequence[httpx.Request]:
        """Return requests for what the provider may have taken."""

    def found(self, ticket: Ticket, answer: ProviderResponse) -> Found:
        """Read a page, or raise Unreadable; that it has nothing of ours concludes nothing."""


@runtime_checkable
class Billing(Protocol):
    """A provider that says what predictions cost when it is asked after their end."""

    @property
    def bills_after(self) -> float | None:
        """Seconds after an end at which it can be asked; None: not with the keys that are set."""

    @property
    def most_billed(self) -> int:
        """Predictions that one request can ask for."""

    def bill(self, tickets: Sequence[Ticket]) -> httpx.Request:
        """Return a request for what predictions cost that have ended."""

    def billed(self, tickets: Sequence[Ticket], answer: ProviderResponse) -> dict[str, int]:
        """Return microdollars by the ids of tickets, of those that it says, or raise Unreadable."""


@runtime_checkable
class Metered(Protocol):
    """A provider that says how many units it counts of a result, and what one of them costs."""

    @property
    def metered_after(self) -> float | None:
        """Seconds after an end at which it can be asked; None: not with the keys that are set."""

    def price(self, model: str) -> httpx.Request:
        """Return a request for what a unit of a model costs."""

    def priced(self, model: str, answer: ProviderResponse) -> float | None:
        """Return US dollars; None where it says none, or raise Unreadable."""

    def meter(self, ticket: Ticket) -> httpx.Request:
        """Return a request for the units of a result."""

    def metered(self, answer: ProviderResponse) -> float | None:
        """Return the units; None where it does not say them, or raise Unreadable."""


@runtime_checkable
class Publishing(Protocol):
    """A provider that hands out what proves its callbacks."""

    def keys(self) -> httpx.Request:
        """Return a request for its public keys, or for its account's secret."""

    def read_keys(self, body: bytes) -> list[bytes]:
        """Return what `authenticate` wants as keys, or raise Unreadable."""


@runtime_checkable
class Addressing(Protocol):
    """A provider whose description of a model says where a blocking submit goes."""

    def details(self, model: str) -> httpx.Request: ...
    def addressed(self, ticket: Ticket, answer: ProviderResponse) -> Ticket | Refused | Postponed:
        """Read the description: return the ticket with its address among its links."""


@runtime_checkable
class Guarding(Protocol):
    """A provider some of whose results are given only to who has our key."""

    def authorization(self, url: str) -> str | None:
        """Return the Authorization for a result; None for any address that must not have it."""


def can_prove(provider: Provider, secrets: Collection[object]) -> bool:
    """Return whether callbacks can be proved, with those secrets of its account that are set."""
    if provider.proof != "account_secret":
        return provider.proof != "none"
    return bool(secrets) or isinstance(provider, Publishing)
