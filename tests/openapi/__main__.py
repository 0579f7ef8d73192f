"""Write the OpenAPI document and its HTML page into the package: `make docs`."""

from __future__ import annotations

from tests.openapi import FILES, FOLDER

for name, make in FILES.items():
    (FOLDER / name).write_bytes(make())
