"""Keep every result before its URL expires. Use: `SAVE_URL=s3://bucket/art receiver serve save`.

A store reads its credentials from the environment (AWS_…, GOOGLE_…, AZURE_…; AWS_ENDPOINT_URL for
other servers with the S3 API). SAVE_NAME has all fields of a Template, and number, sha256,
extension: `{sha256}.{extension}` keeps equal results once, and
`{provider}/{date:%Y-%m}/{id}-{number}.{extension}` sorts them into folders.

A file never replaces another: if its name is taken by a file with other content, the start of its
digest is added to its name. The same file, after a retry or a replay, is not written again.

The place, digest, size and type of a result are recorded as `output[…].stored`. An all-black
picture, as content filters produce, is kept and reported: `flagged` there, and in the metadata. A
result of a type that SAVE_TYPES does not name is not kept, and is noted with the attempt.
"""

import asyncio
import hashlib
import os
import re
import secrets
import unicodedata
from datetime import timedelta
from functools import partial
from pathlib import Path, PurePosixPath
from shutil import copyfile
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from weakref import WeakValueDictionary

from receiver import (
    Context,
    Dead,
    Event,
    Fetched,
    Output,
    Skip,
    Stored,
    Template,
    on,
    read_settings,
)

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, NotSupportedError
    from obstore.store import ObjectStore, from_url
    from PIL import Image
except ModuleNotFoundError as error:
    raise ValueError(
        f"save needs more than is installed ({error.name} is missing): "
        "pip install 'prediction-receiver[storage]'"
    ) from error

FAMILIES = {"application", "audio", "font", "image", "model", "text", "video"}
CLOUDS = ("AWS_", "AZURE_", "GOOGLE_")  # variables that a store reads by itself, unchanged
ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
SOON = {"max_retries": 2, "retry_timeout": timedelta(seconds=30)}  # the delivery is retried anyway


def place(text: str) -> tuple[Path | ObjectStore, str]:
    """Open a folder or a store, without a request; return it and the start of its addresses."""
    if text[0] == text[-1] and text[0] in "\"'":
        raise ValueError("must come without quotes")
    if "://" in text and not text.startswith("file:"):
        return store(text), text
    folder = Path(unquote(urlsplit(text).path) if text.startswith("file:") else text)
    try:
        folder = folder.expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"is a folder that cannot be made: {error}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"is a folder that may not be written to: {folder}")
    return folder, folder.as_uri()


def store(url: str) -> ObjectStore:
    options = None
    for variable, value in os.environ.items():
        if variable.startswith(CLOUDS) and value != value.strip().strip("\"'"):
            raise ValueError(f"needs {variable} without blanks, line ends or quotes around it")
    for variable in ENDPOINTS:
        server = os.environ.get(variable, "")
        if server and not re.fullmatch(r"https?://[^\s\"']+", server):
            raise ValueError(f"needs {variable} to be an address, as http://minio:9000")
        # By writing http://, the operator has allowed it.
        if server.startswith("http://") and "AWS_ALLOW_HTTP" not in os.environ:
            options = {"allow_http": True}
    try:
        opened: ObjectStore = from_url(url, retry_config=SOON, client_options=options)  # type: ignore[call-overload]
    except (BaseError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"must be a folder or a store, as s3://bucket/path: {reason}") from None
    return opened


def name(text: str) -> Template:
    literal = re.sub(r"\{[^{}]*\}", "x", text)
    if ".." in literal.split("/") or literal.endswith("/"):
        raise ValueError("must name a file below SAVE_URL, without ..")
    return Template(text, more=("number", "sha256", "extension"))


def types(text: str) -> tuple[str, ...]:
    given = [part.strip().lower().removesuffix("*") for part in text.split(",") if part.strip()]
    for part in given:
        if part and part.partition("/")[0] not in FAMILIES:
            raise ValueError(f"must be content types or how they begin, as image/, not {part!r}")
    return tuple(part if "/" in part or not part else f"{part}/" for part in given)


with read_settings() as read:
    PLACE = read.parsed(
        "SAVE_URL",
        "a folder, or the address of a store: s3://bucket/path, gs://…, az://container/path",
        place,
        default=read.text("SAVE_DIR", "another name for SAVE_URL", default="results"),
    )
    NAME = read.parsed(
        "SAVE_NAME",
        "a Template for how files are named",
        name,
        default="{id}-{number}-{sha256:.12}.{extension}",
    )
    PUBLIC_URL = read.url("SAVE_PUBLIC_URL", "where people find what is in the store", default="")
    TYPES = read.parsed(
        "SAVE_TYPES",
        "content types to keep, or how they begin, by comma",
        types,
        default="image/,video/,audio/",
    )
    MAX_BYTES = read.size("SAVE_MAX_BYTES", "the largest result to keep", default="256MiB")

STORE, ADDRESS = PLACE
BASE = (PUBLIC_URL or ADDRESS).rstrip("/")
MOST_PIXELS = 64_000_000
DARKEST_LIGHT = 9  # of 255: black pixels in a JPEG may be slightly lighter
LONGEST_FIELD = 100  # bytes
LONGEST_PART = 240  # bytes, of the 255 that file systems take
MOST_AT_ONCE = 8 * 1024 * 1024  # bytes that one request may carry, from memory
LOOKING: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # names in Windows


@on("succeeded", name="save", timeout=600)
async def save(event: Event, ctx: Context) -> None:
    outputs = event.prediction.output or []
    wanted = [number for number, output in enumerate(outputs) if output.url]
    if not wanted:
        raise Skip("no output has a URL")
    lost, unwanted, kept = [], [], 0
    for number in wanted:
        try:
            found = await ctx.once(f"save/{number}", partial(keep, event, ctx, number))
        except Unwanted as error:
            unwanted.append(f"output {number}: {error}")
        except Dead as error:  # the other outputs are still wanted
            lost.append(f"output {number}: {error}")
        else:
            kept += 1
            await ctx.record_stored(number, Stored(**found))
            if found.get("flagged") and "flagged" not in event.prediction.metadata:
                await ctx.annotate(flagged=found["flagged"])
    ctx.note("\n".join(unwanted))
    if lost or not kept:
        raise Dead("; ".join(lost + unwanted))


class Unwanted(Dead):
    """A result of a type that SAVE_TYPES does not name."""


async def keep(event: Event, ctx: Context, number: int) -> dict[str, Any]:
    output: Output = (event.prediction.output or [])[number]
    file: Fetched = await ctx.fetch(output, max_bytes=MAX_BYTES)
    what = f"{file.size} bytes of {file.content_type}"
    if not file.content_type.startswith(TYPES):
        raise Unwanted(f"{what}, which SAVE_TYPES does not name")
    if file.size == 0:
        raise Dead(what)
    kept = {
        "url": f"{BASE}/{quote(await put(name_of(event, number, file), file))}",
        "sha256": file.sha256,
        "size": file.size,
        "content_type": file.content_type,
    }
    if await asyncio.to_thread(is_black, file):
        kept["flagged"] = "all_black"
    ctx.log.info("saved", **kept)
    return kept


def name_of(event: Event, number: int, file: Fetched) -> str:
    more = {"number": number, "sha256": file.sha256, "extension": file.extension}
    parts = NAME.fill(event, clean, more).split("/")
    return "/".join(fitting(part) for part in parts if part not in {"", "."}) or "_"


def clean(text: str) -> str:
    """Return a field as a safe part of a name, in any script: no folders, no hidden files."""
    text = unicodedata.normalize("NFC", text)
    cleaned = re.sub("\0+", "-", "".join(char if is_plain(char) else "\0" for char in text))
    return shorten(cleaned.strip("."), LONGEST_FIELD) or "_"


def is_plain(char: str) -> bool:
    """Return whether a character is a letter, digit, mark or emoji."""
    kind = unicodedata.category(char)
    return char in "_.@+-" or kind[0] in "LNM" or (kind == "So" and not char.isascii())


def fitting(part: str, more: str = "") -> str:
    """Return a part of a name that every file system accepts; `more` goes before its extension."""
    part = re.sub(r'[\x00-\x1f\x7f<>:"|?*\\]+', "-", part).rstrip(". ") or "_"
    path = PurePosixPath(f"_{part}" if RESERVED.match(part) else part)
    ending = shorten(path.suffix, 20)
    return shorten(path.stem, LONGEST_PART - len(ending.encode())) + more + ending


def shorten(text: str, most_bytes: int) -> str:
    return text.encode(errors="replace")[:most_bytes].decode(errors="ignore")


async def put(name: str, file: Fetched) -> str:
    """Store a file completely or not at all; return its name; no other file is replaced."""
    folder, slash, last = name.rpartition("/")
    by_content = f"{folder}{slash}{fitting(last, f'-{file.sha256[:12]}')}"
    for candidate in (name, by_content):
        if isinstance(STORE, Path):
            is_kept = await asyncio.to_thread(write, STORE, STORE / candidate, file)
        else:
            is_kept = await send(STORE, candidate, file)
        if is_kept:
            return candidate
    raise Dead(f"{by_content!r} is taken by another file")


def write(folder: Path, path: Path, file: Fetched) -> bool:
    """Write into the folder; return False if another file has the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    copy = path.with_name(f".saving-{secrets.token_hex(8)}")
    try:
        copyfile(file.path, copy)
        sync(copy)
        link(copy, path)
    except FileExistsError:
        if not path.is_file() or digest(path) != file.sha256:
            return False
    finally:
        copy.unlink(missing_ok=True)
    # The file and its folders must be on the disk before the step is remembered as done.
    for made in (path, *path.parents):
        sync(made)
        if made == folder.parent:
            break
    return True


def link(copy: Path, path: Path) -> None:
    """Link a file to its name; raise FileExistsError if that is taken."""
    try:
        os.link(copy, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links here, so the check and the renaming are two steps
        if path.exists():
            raise FileExistsError(path) from None
        copy.rename(path)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


async def send(store: ObjectStore, name: str, file: Fetched) -> bool:
    """Upload into the store; return False if another file has the name."""

    async def upload(mode: Any) -> None:
        kind = {"Content-Type": file.content_type}
        await obstore.put_async(store, name, file.path, attributes=kind, mode=mode)

    # An upload in parts cannot be "create only if absent": for large files we check first.
    if file.size <= MOST_AT_ONCE:
        try:
            await upload("create")
        except AlreadyExistsError:
            pass
        except BaseError as error:  # not all S3 servers support "create only if absent"
            if not isinstance(error, NotSupportedError) and "NotImplemented" not in str(error):
                raise
        else:
            return True
    async with LOOKING.setdefault(name, asyncio.Lock()):
        known = await digest_in(store, name, file.size)
        if known is None:
            await upload("overwrite")
    return known in {None, file.sha256}


async def digest_in(store: ObjectStore, name: str, size: int) -> str | None:
    """Return the digest of the stored file, `another size`, or None if there is none."""
    try:
        found = await obstore.get_async(store, name)
    except (FileNotFoundError, NotFoundError):
        return None
    if found.meta["size"] != size:
        return "another size"
    sha256 = hashlib.sha256()
    async for piece in found.stream():
        sha256.update(piece)
    return sha256.hexdigest()


def is_black(file: Fetched) -> bool:
    """Return whether a picture is all black; only a file small for its pixel count can be."""
    try:
        with Image.open(file.path, formats=("PNG", "JPEG", "WEBP")) as image:
            pixels = image.width * image.height
            if file.size > max(pixels / 10, 4096) or pixels > MOST_PIXELS:
                return False
            if getattr(image, "n_frames", 1) > 1:  # an animation may begin with black
                return False
            image.draft("L", (image.width // 8, image.height // 8))  # JPEG: an eighth is enough
            return not any(image.convert("L").histogram()[DARKEST_LIGHT:])
    except Exception:  # noqa: BLE001 - no picture, or one crafted to break its reader
        return False
