"""Tried here: declared with Modal's package. Not tried: `modal deploy app.py` (needs an account).

For a project that `receiver init` made, with the settings of its .env in a secret of Modal:
modal secret create receiver --from-dotenv .env
"""

import subprocess
from typing import Any

import modal

image = (
    modal.Image.debian_slim(python_version="3.13")
    .add_local_dir(".", "/app", copy=True, ignore=[".env", ".git", ".venv", "*.db*"])
    .workdir("/app")
    .run_commands("pip install -r requirements.txt")
    .env({"RECEIVER_MODE": "serverless", "RECEIVER_AFTER": "after=20"})
)
app = modal.App("receiver", image=image, secrets=[modal.Secret.from_name("receiver")])


@app.function(timeout=150)
@modal.concurrent(max_inputs=80)
@modal.asgi_app()
def web() -> Any:
    """Answer every request."""
    from receiver.asgi import app as receiver  # noqa: PLC0415 - it is there, not here

    return receiver


@app.function(schedule=modal.Period(minutes=1), timeout=120)
def drain() -> None:
    """Run what is due, once a minute."""
    subprocess.run(["receiver", "drain", "--seconds", "50"], check=True)  # noqa: S607
