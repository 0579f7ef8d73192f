"""Make all calls of the official fal client; print the results as JSON."""

import asyncio
import json
from typing import Any

import fal_client

APP = "fal-ai/nano-banana"
LONG_APP = "fal-ai/nano-banana/edit"
INPUT = {"prompt": "a lighthouse [fast]"}
STILL = {"prompt": "[slow] [never]"}


def name(status: fal_client.Status) -> str:
    return type(status).__name__


def sync_session() -> dict[str, Any]:
    seen: dict[str, Any] = {"updates": [], "logs": []}

    def note(status: fal_client.Status) -> None:
        seen["updates"].append(name(status))
        if isinstance(status, fal_client.Completed):
            seen["logs"] = status.logs

    seen["run"] = fal_client.run(APP, INPUT)
    handle = fal_client.submit(LONG_APP, INPUT)
    seen["get"] = handle.get()
    seen["status"] = name(handle.status(with_logs=True))
    seen["result"] = fal_client.result(LONG_APP, handle.request_id)
    seen["subscribe"] = fal_client.subscribe(
        APP, INPUT, with_logs=True, on_queue_update=note, interval=0.005
    )
    still = fal_client.submit(APP, STILL, webhook_url="http://127.0.0.1:1/")
    seen["queued"] = name(still.status())
    fal_client.cancel(APP, still.request_id)
    cancelled = still.status()
    seen["cancelled"] = isinstance(cancelled, fal_client.Completed) and cancelled.error_type
    try:
        fal_client.run(APP, {"prompt": "[moderated] [fast]"})
    except fal_client.FalClientHTTPError as error:
        seen["error"] = [error.status_code, error.error_type]
    return seen


async def async_session() -> dict[str, Any]:
    seen: dict[str, Any] = {"updates": []}
    client = fal_client.AsyncClient()

    def note(status: fal_client.Status) -> None:
        seen["updates"].append(name(status))

    seen["run"] = await client.run(APP, INPUT)
    handle = await client.submit(LONG_APP, INPUT)
    seen["get"] = await handle.get()
    seen["status"] = name(await client.status(LONG_APP, handle.request_id))
    seen["result"] = await client.result(LONG_APP, handle.request_id)
    seen["subscribe"] = await client.subscribe(APP, INPUT, on_queue_update=note, interval=0.005)
    still = await client.submit(APP, STILL)
    seen["queued"] = name(await still.status())
    await still.cancel()
    cancelled = await still.status()
    seen["cancelled"] = isinstance(cancelled, fal_client.Completed) and cancelled.error_type
    return seen


if __name__ == "__main__":
    print(json.dumps({"sync": sync_session(), "async": asyncio.run(async_session())}))  # noqa: T201
