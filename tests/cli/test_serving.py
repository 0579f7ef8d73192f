"""The fast path of `receiver serve`: simple arguments are read without the full parser."""

from __future__ import annotations

import pytest
from typer.main import get_command

from receiver.cli.commands import main
from receiver.cli.main import plain


@pytest.mark.parametrize(
    "words",
    [
        "",
        "log",
        "my_handlers.py save --port 80",
        "--host 0.0.0.0 log --port 0 save",
        "--no-dispatch --host :: --port 65535",
        "--port 1 --port 2 --host a --host b",
    ],
)
def test_fast_path_reads_serve_arguments_as_the_full_parser_does(words: str) -> None:
    given = plain(["serve", *words.split()])
    assert given is not None
    command = get_command(main).get_command(None, "serve")  # type: ignore[attr-defined]
    read = command.make_context("serve", words.split()).params
    used = {name: read.pop(name) for name in ("handlers", "host", "port", "no_dispatch")}
    used["handlers"] = tuple(used["handlers"] or ())
    assert used == {
        "handlers": tuple(given.handlers),
        "host": given.host,
        "port": given.port,
        "no_dispatch": not given.dispatch,
    }
    assert not any(read.values())


@pytest.mark.parametrize(
    "words",
    [
        *("", "worker", "--version", "serve --help", "serve --dev", "serve --emulate a.py"),
        *("serve --port", "serve --port x", "serve --port 65536", "serve --port -1", "serve -- a"),
        *("serve --port=80", "serve --host --port 80", "serve --reload", "serve \udcff"),
    ],
)
def test_fast_path_leaves_other_arguments_to_the_full_parser(words: str) -> None:
    assert plain(words.split()) is None
