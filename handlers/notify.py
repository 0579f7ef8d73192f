"""Notify people: Slack, Discord, Telegram, mail, Teams and a hundred more services, by apprise.

Use: `NOTIFY_URLS="discord://… mailto://…" receiver serve notify` (needs the extra `notify`).

NOTIFY_URLS holds addresses of services as in https://appriseit.com/services, separated by blanks.

Results are attached if the service accepts attachments; otherwise, or if one is gone or too large,
the text ends with their addresses. A text that is too long for a service is sent in parts. Each
service is a separate step: if one fails, the others are still notified, and only once.
"""

import asyncio
import logging
import re
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from hashlib import blake2s
from pathlib import Path

import httpx

from receiver import Context, Dead, Event, Output, Retry, on, read_settings

try:
    from apprise import Apprise, AppriseAsset, NotifyFormat, NotifyType
    from apprise.plugins.base import NotifyBase
except ImportError:
    raise ValueError("notify needs apprise: pip install 'prediction-receiver[notify]'") from None

LONGEST_TITLE = 200
LONGEST_TEXT = 8_000
MOST_RESULTS = 10
FETCHING = 60.0  # seconds
ASSET = AppriseAsset(app_id="prediction-receiver", async_mode=False)
KINDS = {
    "prediction.succeeded": NotifyType.SUCCESS,
    "prediction.failed": NotifyType.FAILURE,
    "prediction.canceled": NotifyType.WARNING,
}
TOO_LARGE = 413
FINAL = frozenset(range(400, 500)) - {408, 425, 429}
STATUS = re.compile(r"error=(\d{3})\b")
LINKS = re.compile(r"https?://[^\s<>]+(?:\nhttps?://[^\s<>]+)*")
PINGS = re.compile(r"@|<(?=[!@#])")
UNFIT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
CAPTURED: ContextVar[list[str] | None] = ContextVar("CAPTURED", default=None)


class LogCapture(logging.Handler):
    """Captures apprise's log and prints none of it: it may quote addresses, and so tokens."""

    def emit(self, record: logging.LogRecord) -> None:
        messages = CAPTURED.get()
        if messages is not None:
            messages.append(record.getMessage())


LOGGER = logging.getLogger("apprise")
LOGGER.handlers, LOGGER.propagate = [LogCapture()], False
LOGGER.setLevel(logging.WARNING)
for name in ("urllib3", "oauthlib", "requests_oauthlib"):
    logging.getLogger(name).setLevel(logging.WARNING)  # below that, they log whole addresses


@dataclass(frozen=True)
class Service:
    name: str
    """Its number and kind only: `url(privacy=True)` would show headers, paths and parameters."""
    step: str
    plugin: NotifyBase


@dataclass(frozen=True)
class Letter:
    title: str
    text: str
    kind: NotifyType
    results: list[tuple[Path | None, str]]
    """Per result, a file if there is one, and the line for the text if it is not attached."""


def service(place: int, url: str) -> Service:
    schema = re.sub(r"[^\w+-]", "", url.partition("://")[0])[:20] if "://" in url else "?"
    name = f"{place} ({schema})"
    whole = url if "overflow=" in url else f"{url}{'&' if '?' in url else '?'}overflow=split"
    plugin = Apprise.instantiate(whole, asset=ASSET)
    if plugin is None:
        raise ValueError(f"has an address that apprise does not understand: number {name}")
    return Service(name, f"notify/{blake2s(url.encode(), digest_size=4).hexdigest()}", plugin)


def services(text: str) -> list[Service]:
    if text[0] == text[-1] and text[0] in "\"'":
        raise ValueError("must come without quotes")
    return [service(place, url) for place, url in enumerate(dict.fromkeys(text.split()), 1)]


def bundle(text: str) -> str:
    if text and not Path(text).exists():
        raise ValueError(f"names {text}, which is not there: unset it, or name certificates")
    return text


with read_settings() as read:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # apprise's HTTP client reads them
        read.parsed(name, "whom to trust, where it is not certifi's list", bundle, default="")
    SERVICES = read.parsed("NOTIFY_URLS", "at least one address as apprise writes it", services)
    TITLE = read.template("NOTIFY_TITLE", "a Template", default="{model} {type}")
    TEXT = read.template(
        "NOTIFY_TEXT",
        "a Template",
        default="{prompt:.500}\n{text:.1000}\n{error:.500}",
    )
    MAX_BYTES = read.size("NOTIFY_MAX_BYTES", "the largest result to attach", default="8MiB")


@on("*", name="notify", timeout=240, concurrency=4, after="save")
async def notify(event: Event, ctx: Context) -> None:
    letter = await write(event, ctx)
    steps = [ctx.once(service.step, partial(send, service, letter)) for service in SERVICES]
    ended = await asyncio.gather(*steps, return_exceptions=True)
    pairs = zip(SERVICES, ended, strict=True)
    failed = {service.name: error for service, error in pairs if isinstance(error, BaseException)}
    if failed:
        hopeless = all(isinstance(error, Dead) for error in failed.values())
        failures = [f"{name}: {error_text(error)}" for name, error in failed.items()]
        raise (Dead if hopeless else Retry)(f"not sent to {'; '.join(failures)}")


def error_text(error: BaseException) -> str:
    """Return the text of our own errors; of others, which may quote an address, only the type."""
    return str(error) if isinstance(error, Dead | Retry) else type(error).__name__


async def write(event: Event, ctx: Context) -> Letter:
    outputs = [output for output in event.prediction.output or [] if output.url]
    found = [fetch_result(ctx, n, output) for n, output in enumerate(outputs[:MOST_RESULTS], 1)]
    results = list(await asyncio.gather(*found))
    if len(outputs) > MOST_RESULTS:
        results.append((None, f"and {len(outputs) - MOST_RESULTS} more"))
    text = re.sub(r"\n\s*\n", "\n", TEXT.fill(event, tame)).strip()[:LONGEST_TEXT]
    title = " ".join(TITLE.fill(event, tame).split())[:LONGEST_TITLE]
    return Letter(title, text, KINDS[event.type], results)


async def fetch_result(ctx: Context, number: int, output: Output) -> tuple[Path | None, str]:
    """Fetch a result to attach; if that fails, the message is sent without it."""
    if output.stored and output.stored.flagged:
        return None, f"result {number} is left out: {tame(output.stored.flagged)}"
    line = tame(output.address) or f"result {number} has no address"
    if not any(service.plugin.attachment_support for service in SERVICES):
        return None, line
    try:
        file = await ctx.fetch(output, max_bytes=MAX_BYTES, seconds=FETCHING)
    except (Dead, httpx.HTTPError, TimeoutError):
        return None, line
    return file.path.rename(file.path.with_name(f"result-{number}.{file.extension}")), line


def tame(text: str) -> str:
    """Keep a field from pinging people: escape @ in a link, else add a zero-width space."""
    text = UNFIT.sub(" ", text)
    if LINKS.fullmatch(text):
        return text.replace("@", "%40")
    return PINGS.sub("\\g<0>\N{ZERO WIDTH SPACE}", text)


def send(service: Service, letter: Letter) -> None:
    """Send to one service; it blocks, so it is a plain step, which runs in a thread."""
    attach = service.plugin.attachment_support
    failure = try_service(service, letter, attach=attach)
    if failure == TOO_LARGE and attach:
        failure = try_service(service, letter, attach=False)
    if failure is not None:
        reason = f"HTTP {failure}" if failure else "apprise could not send it"
        raise (Dead if failure in FINAL else Retry)(reason)


def try_service(service: Service, letter: Letter, *, attach: bool) -> int | None:
    """Send; return None, or the HTTP status of a failure, 0 if that is unknown."""
    files = [str(path) for path, _ in letter.results if path and attach]
    lines = [line for path, line in letter.results if not (path and attach)]
    body = "\n".join([letter.text, *(line for line in lines if line not in letter.text)]).strip()
    messages: list[str] = []
    CAPTURED.set(messages)
    to = Apprise(service.plugin, asset=ASSET)
    kind, form = letter.kind, NotifyFormat.TEXT
    if to.notify(body or letter.title, letter.title, kind, form, attach=files or None):
        return None
    statuses = STATUS.findall(" ".join(messages))
    return int(statuses[-1]) if statuses else 0
