"""Keep every result before its URL expires. Use: `SAVE_DIR=pictures receiver serve save`.

Each file is written whole or not at all, and is named by its prediction, its place among the
outputs and the start of its SHA-256. SAVE_TYPES names the content types to accept, by their starts;
SAVE_MAX_BYTES the largest size.
"""

import asyncio
import mimetypes
import os
import shutil
from functools import partial
from pathlib import Path

from receiver import Context, Dead, Event, Fetched, Output, Skip, on

FOLDER = Path(os.environ.get("SAVE_DIR", "results"))
TYPES = tuple(os.environ.get("SAVE_TYPES", "image/,video/,audio/").split(","))
MAX_BYTES = int(os.environ.get("SAVE_MAX_BYTES", str(256 * 1024 * 1024)))


@on("succeeded", name="save", timeout=300)
async def save(event: Event, ctx: Context) -> None:
    outputs = [output for output in event.prediction.output or [] if output.url]
    if not outputs:
        raise Skip("no output has a URL")
    for number, output in enumerate(outputs):
        await ctx.once(f"save/{number}", partial(keep, event, ctx, number, output))


async def keep(event: Event, ctx: Context, number: int, output: Output) -> str:
    file: Fetched = await ctx.fetch(output, max_bytes=MAX_BYTES)
    if not file.content_type.startswith(TYPES) or file.size == 0:
        raise Dead(f"output {number} is {file.size} bytes of {file.content_type}")
    suffix = mimetypes.guess_extension(file.content_type) or ".bin"
    target = FOLDER / f"{event.prediction.id}-{number}-{file.sha256[:12]}{suffix}"
    await asyncio.to_thread(write, file.path, target)  # a large file takes the disk a while
    ctx.log.info("saved", path=str(target), bytes=file.size, sha256=file.sha256)
    return str(target)


def write(source: Path, target: Path) -> None:
    """Copy under another name on the target's own disk, then rename: no one sees half a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, part)
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name is on the disk before the step is remembered as done
    os.close(folder)
