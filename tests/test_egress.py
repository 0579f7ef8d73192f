"""Settings of outgoing requests: proxies, certificates, and the URL and key of client commands."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import httpx
import pytest

from receiver.cli.client import Client
from receiver.model.errors import SettingsError
from receiver.settings import Caller, Secret, Settings
from receiver.settings.egress import outward
from receiver.settings.proxies import Proxies
from receiver.settings.tls import trusted
from tests.emulator.parts import write_certificate

NEEDED: Final = {"RECEIVER_SECRET_KEY": "s" * 32}
AT_ONCE: Final = 16
PROXY: Final = "http://proxy.test:3128"


def proxies(**env: str) -> Proxies:
    return Settings.read({**NEEDED, **env}).proxies


def problems(**env: str) -> list[str]:
    return Settings.parse({**NEEDED, **env})[1]


@pytest.mark.parametrize(
    ("env", "http", "https"),
    [
        ({}, None, None),
        ({"HTTPS_PROXY": "proxy.test:3128\r"}, None, PROXY),
        ({"ALL_PROXY": f"'{PROXY}'"}, PROXY, PROXY),
        ({"all_proxy": PROXY, "ALL_PROXY": "http://other.test"}, PROXY, PROXY),
        ({"HTTP_PROXY": PROXY, "http_proxy": "", "HTTPS_PROXY": "HTTP://x"}, None, "http://x"),
        ({"http_proxy": "http://[::1]:3128", "https_proxy": PROXY}, "http://[::1]:3128", PROXY),
        # A proxy that no request would use is not checked: GNOME sets ALL_PROXY with the others.
        ({"HTTP_PROXY": PROXY, "HTTPS_PROXY": PROXY, "ALL_PROXY": "socks4://x"}, PROXY, PROXY),
    ],
)
def test_proxy_variables_are_read_as_other_programs_read_them(
    env: dict[str, str], http: str | None, https: str | None
) -> None:
    given = proxies(**env)
    assert given.of("http", "a.test", None) == http
    assert given.of("https", "a.test", None) == https


@pytest.mark.parametrize("name", ["ALL_PROXY", "https_proxy"])
@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("socks4://127.0.0.1:1080", "socks4"),
        ("ftp://127.0.0.1", "ftp"),
        ("http://", "address"),
        ("http://:3128", "address"),
        ("http://me:hush@[::1", "address"),
        ("http://me:hush@proxy.test:99999", "address"),
        ("http://me:hush@proxy.test:port", "address"),
        ("http://me:hush@a b", "address"),
        ("http://\u2603.test", "address"),
    ],
)
def test_invalid_proxy_is_rejected_without_showing_its_password(
    name: str, text: str, word: str
) -> None:
    [problem] = problems(**{name: text})
    assert problem.startswith(f"{name}: ")
    assert word in problem
    assert "hush" not in problem


@pytest.mark.parametrize("text", ["socks://127.0.0.1:1080/", "socks5://h", "socks5h://h:1"])
def test_socks_proxy_is_accepted_only_with_the_socks_extra(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr("receiver.settings.proxies.find_spec", lambda _: None)
    [problem] = problems(ALL_PROXY=text)
    assert "pip install 'httpx[socks]'" in problem
    monkeypatch.setattr("receiver.settings.proxies.find_spec", lambda _: object())
    assert str(proxies(ALL_PROXY=text).of("https", "a.test", None)).startswith("socks5")


@pytest.mark.parametrize(
    ("text", "host", "port", "straight"),
    [
        ("fd00::/8", "fd00::1", None, True),
        ("fd00::/8", "fe00::1", None, False),
        ("[2001:db8::1]", "2001:db8::1", None, True),
        ("[2001:db8::1]:8000", "2001:db8::1", 8001, False),
        ("2001:DB8::1", "2001:db8:0::1", None, True),
        ("10.0.0.0/8, 192.0.2.7", "10.9.8.7", None, True),
        ("10.0.0.0/8 192.0.2.7", "192.0.2.7", None, True),
        ("10.0.0.0/8", "11.0.0.1", None, False),
        ("*", "a.test", None, True),
        ("other.test,*", "a.test", None, True),
        ("a.test", "A.test.", None, True),
        ("a.test", "b.a.test", None, True),
        ("a.test", "ba.test", None, False),
        (".a.test", "b.a.test", None, True),
        ("*.a.test", "b.a.test", None, True),
        ("*.a.test", "b.test", None, False),
        ("10.*", "10.1.2.3", None, True),
        ("a.test:8443", "a.test", 8443, True),
        ("a.test:8443", "a.test", None, False),
        ("https://a.test/", "a.test", None, True),
        ("http://a.test", "a.test", None, False),
        ("all://a.test", "a.test", None, True),
        ("", "a.test", None, False),
        (" , ,\r", "a.test", None, False),
        *(("", host, None, True) for host in ("localhost", "127.0.0.1", "127.9.9.9", "::1")),
        *(("", host, None, True) for host in ("x.localhost", "LOCALHOST.", "::ffff:127.0.0.1")),
    ],
)
def test_no_proxy_matches_hosts_networks_ports_and_loopback(
    text: str, host: str, port: int | None, straight: bool
) -> None:
    given = proxies(ALL_PROXY=PROXY, NO_PROXY=text)
    assert (given.of("https", host, port) is None) == straight


@pytest.mark.parametrize("text", ["10.0.0.0/99", "a.test/path", "a.test:port", ".", "%"])
def test_invalid_no_proxy_entry_is_rejected_with_its_text(text: str) -> None:
    [problem] = problems(ALL_PROXY=PROXY, NO_PROXY=text)
    assert problem.startswith(f"NO_PROXY: {text!r}")
    assert problems(NO_PROXY=text) == []  # without a proxy it has no effect


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[int, list[str]]]:
    """Run a server that answers every request, and yield its port and the request lines."""
    heard: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        heard.append(head.partition(b"\r\n")[0].decode())
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], heard


@pytest.mark.anyio
@pytest.mark.parametrize("lanes", [False, True])
async def test_requests_use_the_proxy_except_to_this_machine(*, lanes: bool) -> None:
    async with listening() as (proxy, asked), listening() as (here, heard):
        given = proxies(http_proxy=f"http://127.0.0.1:{proxy}", NO_PROXY="fd00::/8")
        transport = outward(given, lanes=lanes)
        async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
            await client.get("http://provider.test/a")
            await client.get(f"http://localhost:{here}/b")
    assert asked == ["GET http://provider.test/a HTTP/1.1"]
    assert heard == ["GET /b HTTP/1.1"]


@pytest.mark.anyio
async def test_concurrent_requests_open_one_connection_each_and_reuse_it() -> None:
    connections = 0
    waiting: list[asyncio.StreamWriter] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                waiting.append(writer)
                if len(waiting) == AT_ONCE:  # so that all are in flight at once
                    for each in waiting:
                        each.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                    waiting.clear()
        writer.close()

    transport = outward(proxies(), lanes=True)
    async with (
        await asyncio.start_server(answer, "127.0.0.1", 0) as server,
        httpx.AsyncClient(transport=transport, trust_env=False) as client,
    ):
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for _ in range(3):
            await asyncio.gather(*(client.get(url) for _ in range(AT_ONCE)))
    assert connections == AT_ONCE


@pytest.mark.anyio
async def test_failed_request_releases_its_connection_lane() -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with (
        await asyncio.start_server(hang_up, "127.0.0.1", 0) as server,
        httpx.AsyncClient(transport=outward(proxies(), lanes=True), trust_env=False) as client,
    ):
        for _ in range(2):
            with pytest.raises(httpx.RemoteProtocolError):
                await client.get(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        async with listening() as (port, heard):
            await client.get(f"http://127.0.0.1:{port}/a")
    assert heard == ["GET /a HTTP/1.1"]


# --- certificates and folders ---


def invalid_paths(folder: Path) -> dict[str, dict[str, str]]:
    """Return invalid values by variable, each with a part of its error message."""
    (folder / "empty.pem").touch()
    (folder / "text.pem").write_text("no certificate")
    return {
        "SSL_CERT_FILE": {
            str(folder / "gone.pem"): "No such file",
            str(folder): "directory",
            str(folder / "empty.pem"): "no certificates",
            str(folder / "text.pem"): "no certificates",
        },
        "SSL_CERT_DIR": {str(folder / "gone"): "no certificates", str(folder): "no certificates"},
        "SSLKEYLOGFILE": {str(folder / "gone" / "log"): "No such file", str(folder): "directory"},
        "PROMETHEUS_MULTIPROC_DIR": {str(folder / "empty.pem" / "x"): "cannot be made"},
    }


def test_invalid_tls_and_metrics_paths_are_rejected_with_the_reason(tmp_path: Path) -> None:
    for name, texts in invalid_paths(tmp_path).items():
        for text, reason in texts.items():
            [problem] = problems(**{name: text})
            assert problem.startswith(f"{name}: ")
            assert reason.lower() in problem.lower(), problem


def test_valid_certificate_and_metrics_folder_are_accepted(tmp_path: Path) -> None:
    public, _ = write_certificate(tmp_path)
    assert problems(SSL_CERT_FILE=f" {public}\r") == []
    (tmp_path / "0123abcd.0").write_bytes(public.read_bytes())
    assert problems(SSL_CERT_DIR=f"/nowhere:{tmp_path}", SSL_CERT_FILE="") == []
    shared = tmp_path / "new" / "folder"
    assert problems(PROMETHEUS_MULTIPROC_DIR=str(shared)) == []
    assert not shared.exists()


def test_ca_bundle_is_read_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public, _ = write_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(public))
    assert problems(SSL_CERT_FILE=str(public)) == []
    public.unlink()
    trusted()


# --- how commands find a receiver ---


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "http://127.0.0.1:8000"),
        (" http://127.0.0.1:8000/ ", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000\r", "http://127.0.0.1:8000"),
        ("'https://a.test/art//'", "https://a.test/art"),
        ("127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("localhost", "http://localhost"),
        ("[::1]:8000/art", "http://[::1]:8000/art"),
        ("https://[2001:db8::1]", "https://[2001:db8::1]"),
    ],
)
def test_receiver_url_is_accepted_in_many_forms(text: str, url: str) -> None:
    assert Caller.read({"RECEIVER_URL": text}).url == url


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("RECEIVER_URL", text) for text in ("a.test:8000", "ftp://a.test", "http://", "hush")),
        *(("RECEIVER_URL", f"http://{rest}") for rest in ("me:hush@a.test", "a.test:x", "a b")),
        *(("RECEIVER_URL", f"http://{host}") for host in ("999.1.1.1", "xn--a")),
        *(("RECEIVER_API_KEY", f"hush{end}") for end in ("\u00fc", "\n hush", "\x00", ",hush")),
        ("RECEIVER_API_KEY", "hush\udcff"),
    ],
)
def test_invalid_client_setting_is_rejected_without_showing_its_value(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=name) as refusal:
        Client({name: text})
    assert "hush" not in str(refusal.value)


@pytest.mark.parametrize("text", ["key", "key\r", "key\n", "\tkey ", '"key"'])
def test_client_and_server_read_an_api_key_the_same_way(text: str) -> None:
    assert Caller.read({"RECEIVER_API_KEY": text}).key == Secret("key")
    assert Settings.read({**NEEDED, "RECEIVER_API_KEYS": text}).api_keys == (Secret("key"),)


def test_client_uses_the_proxy_for_a_remote_receiver_only() -> None:
    env = {"ALL_PROXY": PROXY, "NO_PROXY": "b.test"}
    asked = {url: Caller.read({**env, "RECEIVER_URL": url}).proxy for url in (
        "http://a.test", "https://b.test", "http://127.0.0.1:8000",
    )}  # fmt: skip
    assert asked == {"http://a.test": PROXY, "https://b.test": None, "http://127.0.0.1:8000": None}
    Client({"ALL_PROXY": "socks4://nowhere"}).close()
