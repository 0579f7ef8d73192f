"""Make the picture of the dashboard that the README shows: python -m tests.dashboard.picture."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any, Final

from PIL import Image

from tests.dashboard.desk import Desk, desk_in

PICTURE: Final = Path(__file__).parent.parent.parent / "deploy" / "dashboard.png"
_PROMPTS: Final = (
    ("fal", "a lighthouse at dusk, oil on canvas"),
    ("eachlabs", "a red fox in snow, morning light"),
    ("oxen", "an isometric city at night, neon, rain"),
    ("fal", "portrait of an astronaut made of paper"),
    ("eachlabs", "a bowl of ramen, studio photo"),
    ("fal", "a glass teapot on a window sill"),
    ("oxen", "une île déserte sous les étoiles"),
    ("fal", "a poster for a jazz concert [fail]"),
    ("eachlabs", "a quiet harbour in fog"),
    ("fal", "a forest that never ends [never]"),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, desk_in(Path(folder)) as desk:
        _take(desk)


def _take(desk: Desk) -> None:
    names = [desk.submit(prompt, provider=provider) for provider, prompt in reversed(_PROMPTS)]
    size: Any = {"width": 1200, "height": 720}
    with desk.page(viewport=size) as page:
        for name in names[2:]:
            desk.go(page, f"/predictions/{name}")
            page.locator("h1 .s-succeeded, h1 .s-failed").wait_for()
        desk.go(page, "/predictions?view=grid")
        page.wait_for_function(
            "() => [...document.querySelectorAll('.tile img')].every((i) => i.naturalWidth > 0)"
        )
        taken = Image.open(io.BytesIO(page.screenshot()))
    taken.convert("RGB").save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
