"""`create_app`: the secret that it generates, and the arguments that it refuses."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from receiver import create_app, on
from receiver.model.errors import HandlerError, StoreUnusable
from receiver.settings import Settings


def development(folder: Path) -> Settings:
    return Settings.read(
        {"RECEIVER_DEV": "1", "RECEIVER_DATABASE_URL": f"sqlite:///{folder / 'dev.db'}"}
    )


def test_generated_secret_is_kept_for_the_next_start(tmp_path: Path) -> None:
    create_app(development(tmp_path))
    kept = tmp_path / "dev.db.dev-secret"
    text = kept.read_text()
    assert len(text) == 64
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    create_app(development(tmp_path))
    assert kept.read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["dev.db.dev-secret"]


@pytest.mark.parametrize("text", ["", "short"])
def test_truncated_secret_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "dev.db.dev-secret").write_text(text)
    with pytest.raises(StoreUnusable, match="remove it"):
        create_app(development(tmp_path))


@pytest.mark.parametrize("word", ["drain", "after=20", 1, None, []])
def test_invalid_dispatch_or_mode_is_refused(tmp_path: Path, word: Any) -> None:
    with pytest.raises(ValueError, match="dispatch must be True, False or 'inline', not "):
        create_app(development(tmp_path), dispatch=word)
    with pytest.raises(ValueError, match="mode must be 'server' or 'serverless', not "):
        create_app(development(tmp_path), mode=word or "severless")  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["save", on("*", name="alone")(lambda _event: None)])
def test_single_handler_instead_of_a_list_is_refused(tmp_path: Path, given: Any) -> None:
    with pytest.raises(HandlerError, match="handlers must be a list"):
        create_app(development(tmp_path), given)


def test_undecorated_function_is_refused_as_a_handler(tmp_path: Path) -> None:
    nothing: Callable[..., None] = lambda _: None  # noqa: E731
    with pytest.raises(HandlerError, match="decorate it with @on"):
        create_app(development(tmp_path), [nothing])


@pytest.mark.anyio
async def test_changing_the_working_directory_does_not_move_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    settings = {"RECEIVER_DEV": "1", "RECEIVER_DATABASE_URL": "sqlite:///dev.db"}
    app = create_app(Settings.read(settings))
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 50000))
    for _ in range(2):
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http,
        ):
            monkeypatch.chdir(tmp_path / "elsewhere")
            (tmp_path / "dev.db").stat()
            assert (await http.get("/readyz")).status_code == 200
            await http.post("/v1/drain")
            assert (await http.get("/readyz")).status_code == 200
    assert [*(tmp_path / "elsewhere").iterdir()] == []
