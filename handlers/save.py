"""Keep every result before its URL expires. Use: `SAVE_URL=s3://bucket/art receiver serve save`.

SAVE_URL     a folder, or the address of a store: s3://bucket/path, gs://bucket/path,
             az://container/path, with the credentials that each finds in the environment (AWS_…,
             GOOGLE_…, AZURE_…; AWS_ENDPOINT_URL for what speaks S3 elsewhere). Default: results
SAVE_NAME    how files are named: `{sha256}.{extension}` keeps equal results once,
             `{provider}/{date:%Y-%m}/{id}-{number}.{extension}` sorts them into folders. All fields
             of a Template, and number, sha256, extension
SAVE_PUBLIC_URL  where people find what is in the store, if they do
SAVE_TYPES   content types to accept, by their starts; SAVE_MAX_BYTES the largest size

Where a result is kept, and what it was, is recorded as `output[…].stored`. A picture that is all
black, as content filters leave it, is kept and reported: `flagged` there, and in the metadata.
"""

import asyncio
import mimetypes
import os
import re
from datetime import timedelta
from functools import partial
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from receiver import Context, Dead, Event, Fetched, Output, Skip, Stored, Template, on

try:
    import obstore
    from obstore.store import LocalStore, ObjectStore, from_url
    from PIL import Image
except ModuleNotFoundError as error:
    raise ValueError(
        f"save needs more than is installed ({error.name} is missing): "
        "pip install 'prediction-receiver[storage]'"
    ) from error

URL = os.environ.get("SAVE_URL") or os.environ.get("SAVE_DIR") or "results"
PUBLIC_URL = os.environ.get("SAVE_PUBLIC_URL", "").rstrip("/")
NAME = Template(
    os.environ.get("SAVE_NAME", "{id}-{number}-{sha256:.12}.{extension}"),
    more=("number", "sha256", "extension"),
)
TYPES = tuple(os.environ.get("SAVE_TYPES", "image/,video/,audio/").split(","))
MAX_BYTES = int(os.environ.get("SAVE_MAX_BYTES", str(256 * 1024 * 1024)))

MOST_PIXELS = 64_000_000
DARKEST_LIGHT = 9  # of 255: JPEG does not keep black quite black

FOLDER = Path(unquote(urlsplit(URL).path) if URL.startswith("file:") else URL).absolute()
IS_LOCAL = "://" not in URL or URL.startswith("file:")
SOON = {"max_retries": 2, "retry_timeout": timedelta(seconds=30)}  # the delivery is retried anyway
STORE: ObjectStore = (
    LocalStore(FOLDER, mkdir=True) if IS_LOCAL else from_url(URL, retry_config=SOON)  # type: ignore[call-overload]
)


@on("succeeded", name="save", timeout=600)
async def save(event: Event, ctx: Context) -> None:
    outputs = event.prediction.output or []
    wanted = [number for number, output in enumerate(outputs) if output.url]
    if not wanted:
        raise Skip("no output has a URL")
    lost = []
    for number in wanted:
        try:
            kept = await ctx.once(f"save/{number}", partial(keep, event, ctx, number))
        except Dead as error:  # the others are wanted all the same
            lost.append(f"output {number}: {error}")
        else:
            await ctx.record_stored(number, Stored(**kept))
            if kept.get("flagged") and "flagged" not in event.prediction.metadata:
                await ctx.annotate(flagged=kept["flagged"])
    if lost:
        raise Dead("; ".join(lost))


async def keep(event: Event, ctx: Context, number: int) -> dict[str, object]:
    output: Output = (event.prediction.output or [])[number]
    file: Fetched = await ctx.fetch(output, max_bytes=MAX_BYTES)
    if not file.content_type.startswith(TYPES) or file.size == 0:
        raise Dead(f"{file.size} bytes of {file.content_type}")
    name = name_of(event, number, file)
    await put(name, file)
    kept = {
        "url": f"{PUBLIC_URL or (FOLDER.as_uri() if IS_LOCAL else URL.rstrip('/'))}/{quote(name)}",
        "sha256": file.sha256,
        "size": file.size,
        "content_type": file.content_type,
    }
    if await asyncio.to_thread(is_black, file):
        kept["flagged"] = "all_black"
    ctx.log.info("saved", **kept)
    return kept


def name_of(event: Event, number: int, file: Fetched) -> str:
    extension = (mimetypes.guess_extension(file.content_type) or ".bin").removeprefix(".")
    more = {"number": number, "sha256": file.sha256, "extension": extension}
    return NAME.fill(event, clean, more).strip("/")


def clean(text: str) -> str:
    """Make a field a harmless part of a name: no folders of its own, nothing hidden or endless."""
    return re.sub(r"[^\w.@+-]+", "-", text, flags=re.ASCII).strip(".")[:100] or "_"


async def put(name: str, file: Fetched) -> None:
    """Store a file, whole or not at all; a second time changes nothing."""
    if not IS_LOCAL:
        attributes = {"Content-Type": file.content_type}
        await obstore.put_async(STORE, name, file.path, attributes=attributes)
        return
    await obstore.put_async(STORE, name, file.path)
    await asyncio.to_thread(sync, FOLDER / name)


def sync(path: Path) -> None:
    """Have file and folders on the disk before the step is remembered as done."""
    while path != FOLDER.parent:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        path = path.parent


def is_black(file: Fetched) -> bool:
    """Look for a picture without any light; only what is small for its pixels can be one."""
    try:
        with Image.open(file.path, formats=("PNG", "JPEG", "WEBP")) as image:
            pixels = image.width * image.height
            if file.size > max(pixels / 10, 4096) or pixels > MOST_PIXELS:
                return False
            if getattr(image, "n_frames", 1) > 1:  # a film may begin in the dark
                return False
            image.draft("L", (image.width // 8, image.height // 8))  # JPEG: an eighth is enough
            return not any(image.convert("L").histogram()[DARKEST_LIGHT:])
    except Exception:  # noqa: BLE001 - no picture, or one made to upset whoever looks at it
        return False
