"""The official fal and Replicate clients work with the emulator over TLS, in separate processes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from receiver.emulator import create_emulator
from receiver.emulator.options import Shape
from tests.emulator.parts import write_certificate
from tests.emulator.serving import FAST, serve
from tests.patience import PATIENCE

HERE = Path(__file__).parent
SHAPES: tuple[Shape, ...] = ("new", "old")


def session(
    script: str, folder: Path, shape: Shape, generation: float = 0.3, **environment: str
) -> dict[str, Any]:
    """Run a client script against one shape; `{}` stands for the address of the emulator."""
    certificate, key = write_certificate(folder)
    app = create_emulator(msgspec.structs.replace(FAST, shape=shape, generation=generation))
    with serve(app, ssl_certfile=certificate, ssl_keyfile=key) as port:
        given = {name: value.format(f"127.0.0.1:{port}") for name, value in environment.items()}
        command = [sys.executable, str(HERE / script)]
        done = subprocess.run(  # not checked, so that the assertion below shows stderr
            command,
            env={**given, "SSL_CERT_FILE": str(certificate)},
            capture_output=True,
            check=False,
            timeout=PATIENCE,
        )
    assert done.returncode == 0, done.stderr.decode()
    seen: dict[str, Any] = msgspec.json.decode(done.stdout)
    return seen


@pytest.mark.parametrize("shape", SHAPES)
def test_official_fal_client_works_with_the_emulator(shape: Shape, tmp_path: Path) -> None:
    session_seen = session(
        "fal_session.py",
        tmp_path,
        shape,
        PATIENCE,  # [slow] predictions are queued for twice as long
        FAL_RUN_HOST="{}/fal/run",
        FAL_QUEUE_RUN_HOST="{}/fal/queue",
        FAL_KEY="key-1",
    )
    for seen in session_seen["sync"], session_seen["async"]:
        for call in ("run", "get", "result", "subscribe"):
            assert seen[call]["images"][0]["url"].startswith("https://127.0.0.1:"), call
        assert seen["status"] == "Completed"
        assert seen["updates"][-1] == "Completed"
        assert seen["queued"] == "Queued"
        assert seen["cancelled"] == "client_cancelled"
    assert set(session_seen["sync"]["logs"][0]) == {"message", "level", "source", "timestamp"}
    assert session_seen["sync"]["error"] == [422, "content_policy_violation"]


@pytest.mark.parametrize("shape", SHAPES)
def test_official_replicate_client_works_with_the_emulator(shape: Shape, tmp_path: Path) -> None:
    seen = session(
        "replicate_session.py",
        tmp_path,
        shape,
        REPLICATE_BASE_URL="https://{}/replicate",
        REPLICATE_API_TOKEN="key-1",
        REPLICATE_POLL_INTERVAL="0.005",
    )
    sync = seen["sync"]
    for each in sync, seen["async"]:
        status, output, version = each["model"]
        assert (status, version) == ("succeeded", "hidden")
        assert "https://127.0.0.1:" in str(output)
        assert "https://127.0.0.1:" in each["run"]
    assert "https://127.0.0.1:" in sync["version"]
    assert (sync["deployment"], sync["get"], sync["canceled"]) == (
        *("succeeded", "succeeded"),
        "canceled",
    )
    assert sync["list"]
    assert sync["secret"].startswith("whsec_")
    assert (sync["account"], sync["described"]) == ("user", "nano-banana")
    assert "NSFW content detected" in sync["failed"]
    assert sync["refused"] == [402, "Insufficient credit"]
