"""Proofs of a call's sender: an HMAC over its raw bytes, or a bearer key."""

import base64
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from receiver import Call, Table, Unproved, read_settings

from ._templates import HEADER

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
UNIX_TIME = re.compile(r"[0-9]{1,11}", re.ASCII)
KEY_BYTES = range(24, 65)
SHORTEST = 16
TOLERANCE = 300  # seconds, as in Standard Webhooks

Secrets: TypeAlias = tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True)
class Bearer:
    """`Authorization: Bearer …`."""

    secrets: Secrets

    def check(self, call: Call) -> None:
        scheme, _, given = call.header("authorization").partition(" ")
        sent = given.strip().encode("latin-1")
        matches = [hmac.compare_digest(sent, secret) for secret in self.secrets]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unproved("bad_bearer")


@dataclass(frozen=True, kw_only=True)
class Signature:
    """A header with one or more HMACs, separated by blanks, of which one must be right."""

    secrets: Secrets
    header: str
    prefix: str = ""
    algorithm: str = "sha256"
    encoding: str = "hex"
    signed: tuple[str, ...] = ("", "body", "")
    """Literal texts and, at every second place, a placeholder: `body`, or `header:NAME`."""
    timestamp: str = ""
    """The header with Unix seconds; without one, old calls are accepted."""
    tolerance: float = TOLERANCE

    def check(self, call: Call) -> None:
        content = self._content(call)
        given = [decoded(one.removeprefix(self.prefix), self.encoding) for one in self._sent(call)]
        right = [hmac.digest(secret, content, self.algorithm) for secret in self.secrets]
        matches = [hmac.compare_digest(one, each) for one in given for each in right]
        if not any(matches):
            raise Unproved("bad_signature" if given else "no_signature")
        if self.timestamp and abs(call.at - seconds(call.header(self.timestamp))) > self.tolerance:
            raise Unproved("stale")

    def _sent(self, call: Call) -> list[str]:
        return [one for one in call.header(self.header).split() if one.startswith(self.prefix)]

    def _content(self, call: Call) -> bytes:
        """Return the signed bytes: every second part is a placeholder for a part of the call."""
        return b"".join(
            part_of(call, part) if number % 2 else part.encode()
            for number, part in enumerate(self.signed)
        )


def part_of(call: Call, name: str) -> bytes:
    if name == "body":
        return call.body
    return call.header(name.removeprefix("header:")).encode("latin-1")


Proof: TypeAlias = Bearer | Signature


def decoded(text: str, encoding: str) -> bytes:
    """Decode a signature; return b"" if it is malformed, which never matches."""
    try:
        return bytes.fromhex(text) if encoding == "hex" else base64.b64decode(text, validate=True)
    except ValueError:
        return b""


def seconds(text: str) -> float:
    if not UNIX_TIME.fullmatch(text):
        raise Unproved("no_timestamp")
    return float(text)


# --- reading them from the file of triggers ---


def read_proof(kind: str, name: str, table: Table, read: read_settings) -> Proof:
    """Read the proof of a trigger; add missing values to the settings' problems."""
    parse, make = PROOFS[kind]
    about = f"the secret that calls of the trigger {name} are proved by"
    variables: tuple[str, ...] = table.need("secret", variables_in, ())
    secrets = [read.parsed(variable, about, parse) for variable in variables]
    return make(table, tuple(filter(None, secrets)))


def variables_in(value: Any) -> tuple[str, ...]:
    """Read names of environment variables; an invalid value may be a secret, so is not quoted."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(map(is_variable, names)):
        raise ValueError(
            "must be the name of an environment variable that holds the secret, or a list of them: "
            'a secret itself has no place in a file. As "SHOP_SECRET"'
        )
    return tuple(names)


def is_variable(value: Any) -> bool:
    return isinstance(value, str) and bool(VARIABLE.fullmatch(value))


def plain(text: str) -> bytes:
    if len(text) < SHORTEST:
        raise ValueError(f"must have {SHORTEST} characters or more; make one: openssl rand -hex 32")
    return text.encode()


def encoded(text: str) -> bytes:
    """Read a secret of Standard Webhooks."""
    inside = text.removeprefix("whsec_")
    key = decoded(inside + "=" * (-len(inside) % 4), "base64")
    if len(key) not in KEY_BYTES:
        raise ValueError(
            "must be whsec_ and base64 (with + and /, not - and _) of 24 to 64 bytes; "
            "make one: echo whsec_$(openssl rand -base64 32)"
        )
    return key


def bearer(_: Table, secrets: Secrets) -> Proof:
    return Bearer(secrets=secrets)


def github(_: Table, secrets: Secrets) -> Proof:
    return Signature(secrets=secrets, header="x-hub-signature-256", prefix="sha256=")


def standard(table: Table, secrets: Secrets) -> Proof:
    return Signature(
        secrets=secrets,
        header="webhook-signature",
        prefix="v1,",
        encoding="base64",
        signed=signed_parts("{header:webhook-id}.{header:webhook-timestamp}.{body}"),
        timestamp="webhook-timestamp",
        tolerance=table.seconds("tolerance", TOLERANCE),
    )


def by_hand(table: Table, secrets: Secrets) -> Proof:
    timestamp: str = table.take("timestamp", header_name, "")
    usual = signed_parts(f"{{header:{timestamp}}}.{{body}}" if timestamp else "{body}")
    signed: tuple[str, ...] = table.take("signed", signed_parts, usual)
    if timestamp and f"header:{timestamp}" not in signed[1::2]:
        table.refuse(f"signed must have {{header:{timestamp}}}: else anybody can write the time")
    return Signature(
        secrets=secrets,
        header=table.need("header", header_name, ""),
        prefix=table.text("prefix", ""),
        algorithm=table.choice("algorithm", ("sha256", "sha512", "sha384", "sha1"), "sha256"),
        encoding=table.choice("encoding", ("hex", "base64"), "hex"),
        signed=signed,
        timestamp=timestamp,
        tolerance=table.seconds("tolerance", TOLERANCE) if timestamp else TOLERANCE,
    )


PROOFS: dict[str, tuple[Callable[[str], bytes], Callable[[Table, Secrets], Proof]]] = {
    "standard": (encoded, standard),
    "github": (plain, github),
    "hmac": (plain, by_hand),
    "bearer": (plain, bearer),
}


def header_name(value: Any) -> str:
    name = value.strip().lower() if isinstance(value, str) else ""
    if not HEADER.fullmatch(name):
        raise ValueError('must be the name of a header, as "X-Signature"')
    return name


def signed_parts(value: Any) -> tuple[str, ...]:
    """Read the template of the signed bytes, such as `v0:{header:x-timestamp}:{body}`."""
    parts = PLACEHOLDER.split(value) if isinstance(value, str) else []
    texts, names = parts[::2], [name.lower() for name in parts[1::2]]
    fit = [name == "body" or HEADER.fullmatch(name.removeprefix("header:")) for name in names]
    if names.count("body") != 1 or not all(fit) or any(set("{}") & set(text) for text in texts):
        raise ValueError('must be what is signed, with the body once, as "{header:x-time}.{body}"')
    return tuple(names[n // 2] if n % 2 else part for n, part in enumerate(parts))
