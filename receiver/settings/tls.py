"""The CA bundle: one TLS context for all clients of a process, as loading it takes 25 ms."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final

from receiver.model.errors import SettingsError
from receiver.model.text import clean

NAMES: Final = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_HASHED: Final = re.compile(r"[0-9a-f]{8}\.\d+")
"""Names of the files in a folder that OpenSSL reads certificates from; it ignores others."""


def trusted() -> ssl.SSLContext:
    """Return a TLS context of SSL_CERT_FILE or SSL_CERT_DIR, as httpx does, or of certifi's list.

    Raises SettingsError, which names the variable.
    """
    require(os.environ)
    cafile, capath = _given(os.environ).values()
    return _context(cafile, None if cafile else capath)


def check(env: Mapping[str, str]) -> list[str]:
    """Return the problems of the variables that Python's TLS reads by itself."""
    given = _given(env)
    problem = _try_keylog(env)
    if problem is None and given["cafile"]:  # nothing can be loaded while the key log fails
        problem = _try_file(given["cafile"])
    elif problem is None and given["capath"]:
        problem = _try_folders(given["capath"])
    return [problem] if problem else []


def require(env: Mapping[str, str]) -> None:
    """Raise SettingsError if `check` finds a problem."""
    if problems := check(env):
        raise SettingsError(problems)


def certifi_context() -> ssl.SSLContext:
    """Return a context of certifi's list, without the variables: to report that they are wrong."""
    import certifi  # noqa: PLC0415 - paid for when used

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certifi.where())
    return context


def _given(env: Mapping[str, str]) -> dict[str, str | None]:
    names = zip(("cafile", "capath"), NAMES, strict=True)
    return {what: clean(env.get(name, "")) or None for what, name in names}


@cache
def _context(cafile: str | None, capath: str | None) -> ssl.SSLContext:
    import certifi  # noqa: PLC0415 - paid for when used

    if cafile:
        return ssl.create_default_context(cafile=cafile)
    if capath:
        return ssl.create_default_context(capath=capath)
    return ssl.create_default_context(cafile=certifi.where())


def _try_keylog(env: Mapping[str, str]) -> str | None:
    path = env.get("SSLKEYLOGFILE", "")
    if not path:
        return None
    try:
        with Path(path).open("a"):
            return None
    except (OSError, ValueError) as error:
        return f"SSLKEYLOGFILE: cannot be written ({_reason(error)}): unset it, or fix the path"


def _try_file(path: str) -> str | None:
    try:
        _context(path, None)
    except ssl.SSLError:
        return f"SSL_CERT_FILE: {path} holds no certificates: name a PEM file, or unset it"
    except (OSError, ValueError) as error:
        return f"SSL_CERT_FILE: {path} cannot be read ({_reason(error)}): fix it, or unset it"
    return None


def _try_folders(paths: str) -> str | None:
    """Return a problem if there is no certificate: OpenSSL takes any path, and trusts no server."""
    for folder in paths.split(os.pathsep):
        try:
            if any(_HASHED.fullmatch(file.name) for file in Path(folder).iterdir()):
                return None
        except (OSError, ValueError):
            continue
    return (
        f"SSL_CERT_DIR: {paths} holds no certificates by the names that OpenSSL looks for: run "
        "`openssl rehash` there, or unset it"
    )


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
