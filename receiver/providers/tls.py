"""Whom we trust: the certificate authorities, read once for all clients of a process.

To read them takes 25 ms, which every client would spend anew, and a cold start several times.
"""

from __future__ import annotations

import ssl
from functools import cache

import httpx


@cache
def trusted() -> ssl.SSLContext:
    """Give what httpx trusts, SSL_CERT_FILE and SSL_CERT_DIR obeyed."""
    return httpx.create_ssl_context()
