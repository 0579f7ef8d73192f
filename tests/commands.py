"""The program's commands, cached: typer would build them anew for each call."""

from __future__ import annotations

from functools import cache
from typing import Final

import typer.main

from receiver.cli.commands import main

COMMANDS: Final = cache(typer.main.get_command)
COMMANDS(main)
typer.main.get_command = COMMANDS
