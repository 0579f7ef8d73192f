"""Check over the network: the receiver at RECEIVER_URL, the public URL, and the providers.

Nothing is submitted and nothing costs money. An answer is trusted as our receiver's only if it is
signed with our secret key; until then no API key is sent there.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import socket
import ssl
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import httpx

from receiver.cli.doctor.findings import Finding, Findings, fail, ok, warn
from receiver.client.steps import PREFIX
from receiver.deliveries.guard import is_public
from receiver.model.errors import Unreadable
from receiver.predictions.tokens import Tokens
from receiver.providers import DECLARED
from receiver.providers.adapter import Provider, ProviderResponse, Publishing, can_prove
from receiver.providers.parsing import error_body
from receiver.providers.transport import BROKEN, read_capped
from receiver.settings import Caller, Settings, advice

_PATIENCE: Final = 5.0
"""Time limit of one request, in seconds."""
_LARGEST_ANSWER: Final = 1024 * 1024
_SMALL: Final = '{"echo":  "é \\u00e9 \\t",\r\n "a": 1.0, "a": 1e0}\n '.encode()
"""A proxy that parses JSON and writes it again changes these bytes."""
_LARGE: Final = 1536 * 1024
"""Bytes of a callback that contains pictures; some proxies accept a million at most."""


REQUEST_ERRORS: Final = (*BROKEN, Unreadable)
"""The errors that `Prober.send` raises."""


class Trouble(NamedTuple):
    """A problem with an answer, or the reason why there is none."""

    says: str
    fix: str
    absent: bool = False
    """Whether it shows that no receiver is there."""


_NO_ANSWER: Final = Trouble(
    f"nothing answers within {_PATIENCE:g} s",
    "check firewalls, and where the proxy forwards to",
    True,
)


class Prober:
    """An HTTP client with limits on time and size, which compares clocks."""

    def __init__(self, client: httpx.AsyncClient, clock: Callable[[], float]) -> None:
        self._client = client
        self.clock = clock
        self.skews: dict[str, float] = {}
        """Seconds by which other servers' clocks are ahead of ours."""

    async def send(self, request: httpx.Request, who: str | None = None) -> ProviderResponse:
        """Return the answer, or raise one of REQUEST_ERRORS.

        `who` names a server whose clock is to be compared with ours.
        """
        request.extensions = {"timeout": httpx.Timeout(_PATIENCE).as_dict()}
        began = self.clock()
        async with asyncio.timeout(_PATIENCE):
            response = await self._client.send(request, stream=True)
            ended = self.clock()
            body = await read_capped(response, _LARGEST_ANSWER)
        if who is not None and "age" not in response.headers:
            self._compare(who, response.headers.get("date", ""), (began + ended) / 2)
        return ProviderResponse(response.status_code, response.headers, body, ended)

    def _compare(self, who: str, date: str, now: float) -> None:
        try:
            # The date is in whole seconds: on average it is half a second behind.
            self.skews[who] = parsedate_to_datetime(date).timestamp() + 0.5 - now
        except (TypeError, ValueError, OverflowError):
            return


# --- the receiver ---


class Echoes:
    """A check that our receiver answers at a URL, and that bodies arrive there unchanged."""

    def __init__(self, prober: Prober, tokens: Tokens) -> None:
        self._prober = prober
        self._tokens = tokens

    async def by_each_key(self, base: str) -> list[Trouble | None]:
        """Send an echo signed with each secret key, newest first; return its trouble or None."""
        now = self._prober.clock()
        tokens = self._tokens.echoes(now)
        return await asyncio.gather(*(self._echo(base, t, _SMALL, now) for t in tokens))

    async def with_much(self, base: str, size: int) -> Trouble | None:
        now = self._prober.clock()
        return await self._echo(base, self._tokens.echoes(now)[0], secrets.token_bytes(size), now)

    async def _echo(self, base: str, token: str, body: bytes, now: float) -> Trouble | None:
        headers = {"Content-Type": "application/json"}
        try:
            answer = await self._prober.send(
                httpx.Request(
                    "POST", f"{base}/webhooks/echo/{token}", content=body, headers=headers
                )
            )
        except REQUEST_ERRORS as error:
            return _broken(error)
        if answer.status != httpx.codes.OK:
            return _refused(answer)
        echo = error_body(answer.body)
        digest, signed = str(echo.get("sha256")), str(echo.get("answer"))
        expected = self._tokens.answer_echo(token, digest, now)
        if not hmac.compare_digest(expected.encode(), signed.encode("utf-8", "replace")):
            return Trouble(
                "something answers there, but it is not a receiver",
                "let the proxy pass /webhooks/ to the receiver, or fix the URL",
            )
        if digest != hashlib.sha256(body).hexdigest():
            return Trouble(
                "the body of a callback is changed on its way",
                "let the proxy pass bodies unchanged: providers sign their bytes",
            )
        return None


_BREAKS: Final[dict[type[BaseException], Trouble]] = {
    ssl.SSLError: Trouble(
        "TLS fails ({0})",
        "install a certificate that is valid for this name, with its intermediate certificates",
    ),
    socket.gaierror: Trouble("its name cannot be resolved", "fix the name, or its DNS record"),
    TimeoutError: _NO_ANSWER,
    httpx.TimeoutException: _NO_ANSWER,
    ConnectionRefusedError: Trouble(
        "nothing listens there (connection refused)", "start the server, or fix the port", True
    ),
}
"""Why there was no answer, by the first of these errors in the chain of causes."""


def _broken(error: BaseException) -> Trouble:
    """Return why there was no answer."""
    cause: BaseException | None = error
    while cause is not None:
        for kind, trouble in _BREAKS.items():
            if isinstance(cause, kind):
                return trouble._replace(says=trouble.says.format(cause))
        several = getattr(cause, "exceptions", ())
        cause = several[0] if several else cause.__cause__ or cause.__context__
    text = f"no answer came ({type(error).__name__}: {error})"
    return Trouble(text, "check what listens there", absent=True)


_REFUSALS: Final = {
    401: (
        "a receiver answers that does not know this secret key, or its clock is a minute off",
        "check that it is the right one; after a change of RECEIVER_SECRET_KEY, restart it",
    ),
    404: (
        "a receiver answers, but gets another path (or it is an older release)",
        "let the proxy pass the whole path, and add nothing to it",
    ),
    405: ("the proxy changes POST to another method", "let it pass the method unchanged"),
}
"""The meaning and fix of a receiver's own refusal of an echo, by its status."""


def _refused(answer: ProviderResponse) -> Trouble:
    """Return the trouble that an answer other than an echo shows."""
    kind = error_body(answer.body).get("type")
    ours = isinstance(kind, str) and kind.startswith(PREFIX)
    text = f"HTTP {answer.status}"
    if 300 <= answer.status < 400:  # noqa: PLR2004 - the redirects
        where = answer.headers.get("location", "nowhere")[:200]
        return Trouble(
            f"it redirects ({text}) to {where}",
            "set the URL that it redirects to: providers treat a redirect as a failure",
        )
    if ours and answer.status in _REFUSALS:
        return Trouble(*_REFUSALS[answer.status])
    if answer.status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
        text = f"the {'receiver' if ours else 'proxy'} accepts no body of this size (HTTP 413)"
        return Trouble(text, "raise its limit (nginx: client_max_body_size)")
    absent = answer.status in {502, 503, 504}
    fix = "start the receiver, or fix where the proxy forwards to" if absent else _OPEN_IT
    return Trouble(f"{text} from something that is not a receiver", fix, absent=absent)


_OPEN_IT: Final = "let the proxy pass POST /webhooks/ to the receiver, without a login"


EchoResults: TypeAlias = Awaitable[Sequence[Trouble | None]]
"""The result for each secret key, newest first."""


async def check_receiver(
    here: EchoResults, caller: Caller, settings: Settings, prober: Prober
) -> Findings:
    """Check the receiver at RECEIVER_URL; `here` is the result of its echoes."""
    troubles = await here
    if not troubles:
        text = "not checked: without a secret key it cannot be recognised"
        return [warn(text, "set RECEIVER_SECRET_KEY")]
    findings = _troubles_of(troubles, settings)
    if all(troubles) and (_is_absent(troubles) or not caller.is_url_set):
        text = f"no receiver of ours answers at {caller.url}: {findings[0].says}"
        fix = "start it with `receiver serve`, or set RECEIVER_URL, and it is checked too"
        return [warn(text, fix)]
    try:
        return findings or await _look_inside(caller, settings, prober)
    except REQUEST_ERRORS as error:
        text = f"it answered the first request, but not the next: {_broken(error).says}"
        return [fail(text, "read its log")]


async def _look_inside(caller: Caller, settings: Settings, prober: Prober) -> Findings:
    """Check that our receiver is ready and accepts our API keys."""

    def get(path: str, key: str = "") -> Awaitable[ProviderResponse]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return prober.send(httpx.Request("GET", caller.url + path, headers=headers))

    keys = {
        number: key.reveal()
        for number, key in enumerate(settings.api_keys, 1)
        if key.reveal().isascii() and key.reveal().isprintable()  # else no header can hold it
    }
    ready, *answers = await asyncio.gather(
        get("/readyz"), *(get("/v1/deliveries?limit=1", key) for key in keys.values())
    )
    findings = []
    if ready.status != httpx.codes.OK:
        text = f"it runs at {caller.url}, but its database takes no writes"
        findings.append(fail(text, "look for store.unavailable in its log"))
    for name in _locked(ready):
        text = f"{name} has locked the account, and its submits wait"
        findings.append(fail(text, _LOCKED, name=f"provider {name}"))
    for number, answer in zip(keys, answers, strict=True):
        if answer.status == httpx.codes.UNAUTHORIZED:
            text = f"the receiver that runs does not know number {number} of RECEIVER_API_KEYS"
            fix = "restart it after a change of RECEIVER_API_KEYS"
            findings.append(fail(text, fix))
    return findings or [ok(f"runs at {caller.url}, ready, knows every key")]


_LOCKED: Final = "check its balance and mails; once it is unlocked, submits go on within a minute"


def _locked(ready: ProviderResponse) -> list[str]:
    """Return the names of the providers that have locked the receiver's account."""
    names = error_body(ready.body).get("locked")
    return [str(name) for name in names] if isinstance(names, list) else []


def _is_absent(troubles: Sequence[Trouble | None]) -> bool:
    return any(trouble is not None and trouble.absent for trouble in troubles)


def _troubles_of(troubles: Sequence[Trouble | None], settings: Settings) -> Findings:
    """Return the findings for the results of all keys; none if all is well."""
    bad = [(number, trouble) for number, trouble in enumerate(troubles, 1) if trouble is not None]
    if len(bad) == len(troubles):
        return [fail(trouble.says, trouble.fix) for _, trouble in bad[:1]]
    return [
        fail(
            f"the receiver that answers does not know number {number} of RECEIVER_SECRET_KEY",
            f"give all processes the same {len(settings.secret_keys)} keys and restart them",
        )
        for number, _ in bad
    ]


# --- the public URL ---


async def check_public_url(
    settings: Settings, broken: Collection[str], echoes: Echoes, here: EchoResults
) -> Findings:
    """Check the URL of callbacks; `here` is the result at RECEIVER_URL."""
    if "RECEIVER_PUBLIC_URL" in broken:
        return []
    url = settings.public_url
    if url is None:
        return [
            warn(
                "RECEIVER_PUBLIC_URL is not set, and no provider can call back",
                "set it to the public https:// URL of this receiver; until then outcomes come by "
                "stream and poll, later",
            )
        ]
    findings = [*_scheme(url, settings), *await _addresses(url, settings)]
    troubles = await echoes.by_each_key(url)
    if not troubles:
        return [*findings, warn("not tried without a secret key", "set one first")]
    if _is_absent(troubles) and all(await here):
        trouble = next(filter(None, troubles))
        text = f"{url} cannot be checked while no receiver runs: {trouble.says}"
        return [*findings, warn(text, "start it, then run the doctor again")]
    if any(troubles):
        return findings + _troubles_of(troubles, settings)
    return [*findings, await _large(url, settings, echoes)]


def _scheme(url: str, settings: Settings) -> Iterator[Finding]:
    if urlsplit(url).scheme != "https":
        yield (warn if settings.dev else fail)(
            f"{url} is not https: others can read callbacks, and the secrets in them",
            "put a proxy with a certificate before the receiver, and name its https:// URL",
        )


async def _addresses(url: str, settings: Settings) -> Findings:
    host = urlsplit(url).hostname or ""
    try:
        entries = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []  # a request there fails with the same error
    private = sorted({str(entry[4][0]) for entry in entries if not is_public(str(entry[4][0]))})
    if not private:
        return []
    if settings.dev:
        text = f"{host} resolves to {private[0]}: only providers on this machine can call back"
        return [warn(text, "use a tunnel for real providers")]
    if host in {*private, "localhost"}:
        text = f"{host} is a private address, which no provider can reach"
        return [fail(text, "name a public host in RECEIVER_PUBLIC_URL")]
    text = f"{host} resolves to {private[0]} here, which no provider can reach"
    return [warn(text, "check that it resolves to a public address from outside")]


async def _large(url: str, settings: Settings, echoes: Echoes) -> Finding:
    size = min(settings.max_body_bytes, _LARGE)
    trouble = await echoes.with_much(url, size)
    if trouble is None:
        return ok(f"{url} leads here, and bodies arrive as they were sent")
    text = f"a callback of {size / 1e6:.1f} MB does not get through: {trouble.says}"
    return warn(text, trouble.fix)


# --- providers ---


def check_any_key(settings: Settings) -> Findings:
    keys = [given.key for given in settings.providers.values()]
    return [] if any(keys) else [warn("none has a key", advice.SET_A_KEY)]


async def check_provider(provider: Provider, settings: Settings, prober: Prober) -> Findings:
    """Test a provider's API key, and fetch its public keys, if it publishes any."""
    given = settings.providers[provider.name]
    if given.key is None:
        return [ok("off, as it has no key")]
    findings: Findings = []
    checks = [_check_key(provider, prober)]
    if isinstance(provider, Publishing) and not given.secrets:
        checks.append(_check_keys(provider, prober))
    elif not can_prove(provider, given.secrets) and (secret := DECLARED[provider.name].secret):
        text = f"its callbacks cannot be proved without {secret}: outcomes come by poll"
        findings = [warn(text, "set it to the secret that the provider shows")]
    return findings + [each for some in await asyncio.gather(*checks) for each in some]


async def _check_key(provider: Provider, prober: Prober) -> Findings:
    try:
        answer = await prober.send(provider.try_key(), provider.name)
    except REQUEST_ERRORS as error:
        return [fail(f"cannot be reached: {_broken(error).says}", _REACH)]
    return [_key_finding(answer, provider.key_works(answer))]


_REACH: Final = "check its URL, and that this machine may connect to it"


def _key_finding(answer: ProviderResponse, works: bool | None) -> Finding:
    text = f"HTTP {answer.status}"
    if works:
        return ok(f"the key is good ({text})")
    if works is False:
        return fail(f"the key is refused ({text})", "set it to a key of your account there")
    if 300 <= answer.status < 400:  # noqa: PLR2004 - the redirects
        return fail(f"it redirects ({text})", "fix its URL, or leave it to the default")
    return warn(f"cannot tell whether the key is good ({text})", "try again later")


async def _check_keys(provider: Publishing, prober: Prober) -> Findings:
    request = provider.keys()
    try:
        answer = await prober.send(request)
        keys = provider.read_keys(answer.body) if answer.status == httpx.codes.OK else []
        text = f"HTTP {answer.status}"
    except REQUEST_ERRORS as error:
        keys, text = [], _broken(error).says
    text = f"the keys that prove its callbacks cannot be fetched from {request.url}: {text}"
    fix = "without them no callback can be proved: check the URL, and that it can be reached"
    return [] if keys else [fail(text, fix)]
