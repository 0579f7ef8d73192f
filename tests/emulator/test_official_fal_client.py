"""The unmodified client package of fal, in a process of its own, over TLS."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from receiver.emulator import create_emulator
from tests.emulator.parts import write_certificate
from tests.emulator.serving import FAST, serve
from tests.patience import PATIENCE

SESSION = Path(__file__).with_name("fal_session.py")


@pytest.fixture(params=["new", "old"])
def session(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Run the client against either generation of shapes."""
    certificate, key = write_certificate(tmp_path)
    # A slow one is in the queue for twice that time.
    app = create_emulator(msgspec.structs.replace(FAST, shape=request.param, generation=PATIENCE))
    with serve(app, ssl_certfile=certificate, ssl_keyfile=key) as port:
        environment = {
            "FAL_RUN_HOST": f"127.0.0.1:{port}/fal/run",
            "FAL_QUEUE_RUN_HOST": f"127.0.0.1:{port}/fal/queue",
            "FAL_KEY": "key-1",
            "SSL_CERT_FILE": str(certificate),
        }
        command = [sys.executable, str(SESSION)]
        done = subprocess.run(  # stderr shows what the client had to say
            command, env=environment, capture_output=True, check=False, timeout=PATIENCE
        )
    assert done.returncode == 0, done.stderr.decode()
    seen: dict[str, Any] = msgspec.json.decode(done.stdout)
    return seen


def test_the_official_client_finds_nothing_amiss(session: dict[str, Any]) -> None:
    for seen in session["sync"], session["async"]:
        for call in ("run", "get", "result", "subscribe"):
            assert seen[call]["images"][0]["url"].startswith("https://127.0.0.1:"), call
        assert seen["status"] == "Completed"
        assert seen["updates"][-1] == "Completed"
        assert seen["queued"] == "Queued"
        assert seen["cancelled"] == "client_cancelled"
    assert set(session["sync"]["logs"][0]) == {"message", "level", "source", "timestamp"}
    assert session["sync"]["error"] == [422, "content_policy_violation"]
