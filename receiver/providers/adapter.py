"""What a provider adapter is, and the few checks that all adapters share.

An adapter does no I/O. It turns values into unsent requests and bytes into values:

    request(ticket, hook)      the submit            accepted(ticket, answer)  -> Receipt
    authenticate(callback, …)  proof or Unproved     read(body)                -> Outcome
    poll(ticket)               how to ask            polled(ticket, answer)    -> Outcome | Follow
    cancel(ticket)             how to stop it
    try_key()                  a harmless question    key_works(answer)        -> bool | None
    search(ticket)             where it can be asked  found(ticket, answer)    -> Found
                               for a lost submit

What more there is to say of a provider before it is set is in `declared`, and how to add one in
deploy/providers.md.
"""

from __future__ import annotations

import base64
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Final, Literal, Protocol, runtime_checkable
from urllib.parse import quote

import httpx
import msgspec

from receiver.model.errors import Problem, Unproved, Unreadable
from receiver.model.tolerant import read_json, text_of
from receiver.model.values import Error, ErrorCode, Outcome, Output, Ticket
from receiver.providers.codes import code_of

LONGEST_MESSAGE: Final = 2000
LONGEST_ID: Final = 200
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

    @property
    def stream_path(self) -> str | None:
        """Where its event stream is, or None where it calls back instead."""

    def check(self, model: str, input: dict[str, Any]) -> None:
        """Refuse, with a Problem, what could never work."""

    def request(self, ticket: Ticket, hook: CallbackTarget | None) -> httpx.Request: ...
    def accepted(self, ticket: Ticket, answer: ProviderResponse) -> Receipt: ...
    def authenticate(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> str | None:
        """Raise Unproved, or give the provider's id that the proof itself covers, if it does."""

    def read(self, body: bytes) -> Outcome: ...
    def poll(self, ticket: Ticket) -> httpx.Request: ...
    def polled(self, ticket: Ticket, answer: ProviderResponse) -> Outcome | Follow: ...
    def cancel(self, ticket: Ticket) -> httpx.Request | None:
        """Return a request that stops it; None: the provider has no way to."""

    def details(self, model: str) -> httpx.Request | None:
        """Return a request for the provider's own description of a model, if it has one."""

    def try_key(self) -> httpx.Request:
        """Return a free request that changes nothing and needs a good key."""

    def key_works(self, answer: ProviderResponse) -> bool | None:
        """Return whether the key was let in; None: the answer does not tell."""


@runtime_checkable
class Streamed(Protocol):
    """A provider that sends outcomes on an event stream instead of calling back."""

    def stream(self) -> httpx.Request: ...
    def heard(self, event: str, data: str) -> Outcome | None: ...


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
        """Read a page, or raise Unreadable."""


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
class Publishing(Protocol):
    """A provider that hands out what proves its callbacks."""

    def keys(self) -> httpx.Request:
        """Return a request for its public keys, or for its account's secret."""

    def read_keys(self, body: bytes) -> list[bytes]:
        """Return what `authenticate` wants as keys, or raise Unreadable."""


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


decode: Final = read_json


def decode_object(body: bytes | str) -> dict[str, Any]:
    """Decode a JSON object, or raise Unreadable."""
    value = decode(body)
    if not isinstance(value, dict):
        raise Unreadable("not a JSON object")
    return value


def content(answer: ProviderResponse) -> dict[str, Any]:
    """Decode the object of a yes, or raise Unreadable; of a refusal, read what can be read."""
    return decode_object(answer.body) if is_yes(answer) else error_body(answer.body)


def error_body(body: bytes) -> dict[str, Any]:
    """Read the words of a refusal: an object as it is, any other text as its `error`."""
    try:
        value = decode(body)
    except Unreadable:
        text = text_of(body[: 4 * LONGEST_MESSAGE])
        value = "" if text.lstrip().startswith("<") else text
    return value if isinstance(value, dict) else {"error": value}


def is_yes(answer: ProviderResponse) -> bool:
    return 200 <= answer.status < 300  # noqa: PLR2004 - any 2xx is a yes


def unexpected(answer: ProviderResponse, why: str = "") -> Unreadable:
    """Return the error for an answer that does not fit our request, with its words."""
    said = why or spoken(error_body(answer.body))
    return Unreadable(f"HTTP {answer.status}{': ' if said else ''}{said}", retry_after(answer))


_UNFIT: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def words(*candidates: Any) -> str:
    """Return the first candidate that says something, as clean text of bounded length; else ''."""
    for candidate in candidates:
        if isinstance(candidate, str) and candidate.strip():
            return _UNFIT.sub(" ", candidate).strip()[:LONGEST_MESSAGE]
    return ""


_WORDY: Final = ("title", "detail", "message", "msg", "error_message", "error", "type", "code")


def spoken(value: Any, *, depth: int = 3) -> str:
    """Return the words of an error, in any form; '' where there is none."""
    if isinstance(value, dict) and depth:
        return join(dict.fromkeys(spoken(value.get(name), depth=depth - 1) for name in _WORDY))
    if isinstance(value, list) and depth:
        return join(dict.fromkeys(spoken(item, depth=depth - 1) for item in value[:20]))
    if type(value) in (int, float) and value:
        return str(value)[:LONGEST_ID]
    said = words(value)
    return "" if said.lower() in _NO_ERROR else said


_NO_ERROR: Final = frozenset({"null", "none", "nil", "undefined", "false", "0", "n/a"})


def is_error(value: Any) -> bool:
    """Return whether an `error` beside a result says that there is one."""
    return value is True or bool(spoken(value))


def identifier(*candidates: Any) -> str | None:
    """Return the first candidate that can be a provider's id, as text."""
    for given in candidates:
        candidate = str(given) if type(given) is int and abs(given) < _LARGEST_NUMBER else given
        if isinstance(candidate, str) and 0 < len(candidate) <= LONGEST_ID and _sane(candidate):
            return candidate
    return None


def _sane(text: str) -> bool:
    """Return whether `text` can be one segment of a path, as every provider's ids become one."""
    return text.isprintable() and not {" ", "/"} & set(text) and text not in {".", ".."}


def failure(message: str, *hints: str) -> Error:
    """Build the error of a failed prediction; `hints`, for machines, only help to find its code."""
    said = message[:LONGEST_MESSAGE]
    return Error(code=code_of(said, [join(hints)]), message=said or "unknown")


def refusal(message: str, *hints: str) -> Refused:
    """Build the receipt of a refused submit, as `failure` builds an error."""
    refused_content = failure(message, *hints).code == "content_policy"
    return Refused(message, "content_policy" if refused_content else "rejected")


_FILE_FIELDS: Final[dict[str, tuple[type, ...]]] = {
    "content_type": (str,),
    "file_name": (str,),
    "file_size": (int,),
    "width": (int,),
    "height": (int,),
    "duration": (int, float),
}
_LARGEST_NUMBER: Final = 2**53
"""Beyond it no size is meant, and not every reader of our JSON would get the same number."""
_DEEPEST_OUTPUT: Final = 12
_MOST_OUTPUTS: Final = 1000


def outputs(value: Any, sent: Any = None) -> list[Output]:
    """Collect what the model made, in any shape a provider uses: text, list, object, nested files.

    In an object, a file is an object with an address, or an address under the name of a result;
    an address under any other name counts only where there is nothing else. What was `sent` as
    input is no result, nor is what stands under the name of an input. Other text counts only where
    it is the whole answer. Depth and number are bounded, as this reads what strangers wrote.
    """
    value = _unwrapped(value)
    known = set(_texts(sent))
    return _found(value, known, any_name=False) or _found(value, known, any_name=True)


def _found(value: Any, known: set[str], *, any_name: bool) -> list[Output]:
    """Collect each address once: as a file with what is said of it, rather than bare."""
    found: dict[str, Output] = {}
    files = _files(value, any_name=any_name, named=True, bare=True, depth=0)
    for number, file in enumerate(itertools.islice(files, _MOST_OUTPUTS)):
        key = file.url or f"text {number}"
        if key not in known and (key not in found or found[key] == Output(url=file.url)):
            found[key] = file
    return list(found.values())


_RESULTS: Final = re.compile(
    r"urls?|data|(?:\w+_)?(?:images?|videos?|audios?|files?|outputs?|results?|mesh(?:es)?|zip|archive|"
    r"gifs?|masks?|frames?|generations?|samples?|artifacts?|glb|svg|wav|mp3|mp4)"
)
"""Names under which a bare address is a result; `image_url` may as well be what was sent."""
_INPUTS: Final = re.compile(
    r"(?:.*_)?(?:prompts?|inputs?|requests?|arguments?|param\w*|loras?|logs?|errors?|detail|metrics|"
    r"timings|webhooks?|callbacks?)|(?:input|init|source|start|end|reference|control|style|"
    r"conditioning|original|user)_.*|\w*(?:status|response|cancel|callback|webhook)_url"
)
"""Names under which an echo of the request stands, or what is said about it."""
_SMALLER: Final = frozenset({"thumbnail", "thumbnails", "thumb", "preview", "poster", "icon"})
"""Beside a file they are that file again."""


def _files(value: Any, *, any_name: bool, named: bool, bare: bool, depth: int) -> Iterator[Output]:
    if depth > _DEEPEST_OUTPUT:
        return
    if isinstance(value, str):
        url = _address(value) if named else ""
        if url:
            yield Output(url=url)
        elif bare and (text := _said(value)):
            yield Output(text=text)
    elif isinstance(value, list):
        for item in value:
            yield from _files(item, any_name=any_name, named=named, bare=bare, depth=depth + 1)
    elif isinstance(value, dict):
        yield from _members(value, any_name=any_name, depth=depth)


def _said(text: str) -> str:
    """Return a text that says something, without the NULs that not every store keeps."""
    return text.replace("\0", "") if text.strip("\0 \t\r\n") else ""


def _unwrapped(value: Any) -> Any:
    """Read a result that came as JSON inside a text."""
    if not isinstance(value, str) or not value.lstrip().startswith(("{", "[")):
        return value
    try:
        inner = decode(value)
    except Unreadable:
        return value
    files = _files(inner, any_name=True, named=True, bare=False, depth=0)
    return inner if any(True for _ in files) else value


def _address(text: str) -> str:
    """Return the address that a text is, without blanks around it; '' for any other text."""
    url = text.strip()
    if url[:5].lower() == "data:":
        head, comma, body = url.partition(",")
        if head.endswith(";base64"):
            body = "".join(body.split())
        fit = comma and body and _DATA.fullmatch(head) and body.isprintable() and " " not in body
        return f"{head},{body}" if fit else ""
    if not _WEB.match(url) or len(url) > _LONGEST_URL or not url.isprintable() or " " in url:
        return ""
    if _PLAIN.fullmatch(url):
        return url
    try:
        return url if httpx.URL(url).host else ""
    except (httpx.InvalidURL, UnicodeError, ValueError):
        return ""


_WEB: Final = re.compile(
    r"https?://(?:[^/?#@\\]*@)?(?:\[[\da-f:.]+\]|[^/?#@\\:\[\]]+)(?::\d{1,5})?(?=[/?#]|$)",
    re.IGNORECASE,
)
_PLAIN: Final = re.compile(
    r"https?://(?:[a-z\d](?:[a-z\d-]{0,61}[a-z\d])?\.)+[a-z]{2,}/[\w./~%+=&?-]*", re.ASCII
)
"""What httpx, which takes its time, would take too."""
_LONGEST_URL: Final = 16 * 1024
_DATA: Final = re.compile(
    r"data:(?:[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=(?:\"[^\"]*\"|[^\s\";]*))*(?:;base64)?", re.IGNORECASE
)


def _texts(value: Any) -> Iterator[str]:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item.strip()
        elif isinstance(item, dict | list):
            left += item.values() if isinstance(item, dict) else item


def _members(value: dict[str, Any], *, any_name: bool, depth: int) -> Iterator[Output]:
    file = _file(value)
    if file is not None:
        yield file
    for name, item in value.items():
        kind = name.lower()[:LONGEST_ID]
        if _INPUTS.fullmatch(kind) or (file and (kind in _SMALLER or isinstance(item, str))):
            continue
        named = any_name or bool(_RESULTS.fullmatch(kind))
        yield from _files(item, any_name=any_name, named=named, bare=False, depth=depth + 1)


def _file(value: dict[str, Any]) -> Output | None:
    """Return the file that an object tells of, by its address or in base64."""
    url, b64 = value.get("url"), value.get("b64_json")
    fields: dict[str, Any] = {"url": _address(url) if isinstance(url, str) else ""}
    if not fields["url"]:
        return data_uri(b64) if isinstance(b64, str) else None
    for name, kinds in _FILE_FIELDS.items():
        given: Any = value.get(name)
        if type(given) in kinds and (isinstance(given, str) or abs(given) < _LARGEST_NUMBER):
            fields[name] = float(given) if float in kinds else given
    return Output(**fields)


_BASE64: Final = re.compile(r"[A-Za-z0-9+/]*={0,2}")
_MAGIC: Final = (
    (b"\x89PNG", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"RIFF", "image/webp"),
)


def data_uri(text: str) -> Output | None:
    """Wrap base64 text as a data URI, with the type its first bytes show; None if it is none."""
    b64 = "".join(text.split())
    try:
        head = base64.b64decode(b64[:16], validate=True)
    except ValueError:
        return None
    if not head or not _BASE64.fullmatch(b64):
        return None
    kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
    if head[4:8] == b"ftyp":
        kind = "video/mp4"
    return Output(url=f"data:{kind or 'application/octet-stream'};base64,{b64}", content_type=kind)


def settle_submit(
    answer: ProviderResponse, message: str, *hints: str
) -> Refused | Postponed | None:
    """Sort a submit's answer by status alone; None: a 2xx, which the adapter reads on.

    `hints` say only which refusal it is.
    """
    if is_yes(answer):
        return None
    said = message or f"HTTP {answer.status} without a reason"
    if answer.status >= 500 or answer.status in _TRY_AGAIN:  # noqa: PLR2004 - the server errors
        return Postponed(
            said, retry_after(answer), whole_provider=answer.status == httpx.codes.TOO_MANY_REQUESTS
        )
    return refusal(said, *hints)


def time_of(text: Any) -> float | None:
    """Read an ISO 8601 time of a provider as unix seconds; None where it is none."""
    try:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def let_in(answer: ProviderResponse, *, sign: bool) -> bool | None:
    """Read the answer to a `try_key`; `sign`: it is what only a good key gets."""
    if answer.status in {401, 403}:
        return False
    return True if sign else None


_TRY_AGAIN: Final = {408, 425, 429}
_LONGEST_WAIT: Final = 365 * 86400.0
"""Seconds past every deadline, within every clock."""


def retry_after(answer: ProviderResponse) -> float | None:
    """Return the seconds to wait, by the header, a field or the words; None: it does not say."""
    seconds = seconds_of(answer.headers.get("retry-after", ""), answer.at)
    if seconds is None and not is_yes(answer):
        body = error_body(answer.body)
        seconds = seconds_of(_number(body.get("retry_after")), answer.at)
        if seconds is None and (wait := _WAIT.search(spoken(body))):
            seconds = float(wait[1])
    return None if seconds is None else min(seconds, _LONGEST_WAIT)


_WAIT: Final = re.compile(r"\b(?:in|after) ~?(\d{1,7}(?:\.\d{1,3})?) ?s(?:ec(?:ond)?s?)?\b")


def _number(value: Any) -> str:
    return str(value) if type(value) in (int, float) and abs(value) < _LARGEST_NUMBER else ""


def seconds_of(text: str, now: float) -> float | None:
    """Read a Retry-After, seconds or a date, as seconds from now; None where it says nothing."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            moment = parsedate_to_datetime(text)
            # HTTP's dates are all UTC; its oldest form does not say so.
            seconds = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() - now
        except (TypeError, ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def model_path(model: str) -> str:
    """Quote a model name for a URL path; a name that could leave its place is refused."""
    segments = model.split("/")
    if any(segment in {"", ".", ".."} for segment in segments):
        raise Problem(422, "invalid-model", "model must be a path like owner/name")
    return "/".join(quote(segment, safe="@:+~") for segment in segments)


def leads_to(url: Any, bases: Iterable[str], domain: str = "") -> bool:
    """Return whether a URL from an answer may be sent our key.

    It may at the origin of one of our bases, and at `domain` and below by plain HTTPS.
    """
    if not isinstance(url, str):
        return False
    try:
        given = _origin(url)
        if given in map(_origin, bases):
            return True
        host = httpx.URL(url).raw_host.decode("ascii")
    except (httpx.InvalidURL, UnicodeError):
        return False
    below = bool(domain) and (host == domain or host.endswith(f".{domain}"))
    return below and given == ("https", b"", host.encode())


def _origin(url: str) -> tuple[str, bytes, bytes]:
    """Read a URL with the parser that will send it: two parsers may see two hosts in one text."""
    parts = httpx.URL(url)
    return parts.scheme, parts.userinfo, parts.netloc


def first(items: Any) -> dict[str, Any]:
    """Return the first object of a list from a stranger, or an empty one."""
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}


def lookup(table: Mapping[str, Any], key: Any, default: Any) -> Any:
    """Read a translation table with a key from a stranger, which may not even be text."""
    return table.get(key.strip().lower(), default) if isinstance(key, str) else default


def join(parts: Iterable[str]) -> str:
    """Put sentences after one another, leaving out the empty ones, within the longest message."""
    return "; ".join(part for part in parts if part)[:LONGEST_MESSAGE]
