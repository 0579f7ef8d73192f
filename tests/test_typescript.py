"""The TypeScript sample compiles against the types generated from /openapi.json."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.openapi import FOLDER
from tests.patience import PATIENCE

SAMPLE: Final = Path(__file__).parent.parent / "deploy/typescript/draw.ts"
PACKAGES: Final = ("openapi-typescript@7.13.0", "typescript@5.9.3", "openapi-fetch@0.17.0")
CHECK: Final = (
    "node_modules/.bin/tsc --noEmit --strict --target es2022 --module nodenext "
    "--moduleResolution nodenext --lib es2022,dom,dom.iterable --skipDefaultLibCheck "
    "draw.ts wrong.ts"
)


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        shlex.split(command),
        cwd=folder,
        env={**os.environ, "npm_config_update_notifier": "false"},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )


@pytest.mark.skipif(not shutil.which("npx"), reason="node and npx are not installed")
def test_typescript_sample_compiles_against_the_generated_types(tmp_path: Path) -> None:
    installed = run(
        tmp_path, f"npm install --prefer-offline --no-audit --no-fund {' '.join(PACKAGES)}"
    )
    if installed.returncode != 0:
        pytest.skip(f"the registry of node's packages does not answer: {installed.stderr[-200:]}")
    text = SAMPLE.read_text()
    (tmp_path / "draw.ts").write_text(text)
    make = text.partition("\n")[0].removeprefix("// ")
    assert "https://hooks.example.org/openapi.json" in make
    local = make.replace("https://hooks.example.org/openapi.json", str(FOLDER / "openapi.json"))
    made = run(tmp_path, local)
    assert made.returncode == 0, made.stdout + made.stderr
    # A copy with a type error shows that the check can fail.
    wrong = text.replace('"/v1/predictions/{id}"', '"/v1/predictions/{name}"')
    (tmp_path / "wrong.ts").write_text(wrong)
    output = run(tmp_path, CHECK).stdout
    assert "wrong.ts" in output, output
    assert "draw.ts" not in output, output
