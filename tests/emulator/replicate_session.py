"""Make all calls of the official replicate client; print the results as JSON."""

import asyncio
import json
import os
import time
from typing import Any

import replicate
from replicate.exceptions import ModelError, ReplicateError
from replicate.prediction import Prediction

MODEL = "google/nano-banana"
VERSION = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
INPUT = {"prompt": "a lighthouse"}
STILL = {"prompt": "[never]"}


def until_ended(prediction: Prediction) -> str:
    """Poll until the end, because the client's own wait does not know `aborted`."""
    while prediction.status in {"starting", "processing"}:
        time.sleep(0.005)
        prediction.reload()
    return prediction.status


def sync_session() -> dict[str, Any]:
    seen: dict[str, Any] = {}
    seen["run"] = str(replicate.run(MODEL, INPUT, use_file_output=False))
    seen["version"] = str(
        replicate.run(f"owner/model:{VERSION}", INPUT, use_file_output=False, wait=False)
    )
    made = replicate.models.predictions.create(MODEL, INPUT, wait=False)
    made.wait()
    seen["model"] = [made.status, made.output, made.version]
    deployed = replicate.deployments.predictions.create("owner/pictures", INPUT)
    seen["deployment"] = until_ended(deployed)
    seen["get"] = replicate.predictions.get(made.id).status
    seen["list"] = made.id in [each.id for each in replicate.predictions.list()]
    still = replicate.predictions.create(version=VERSION, input=STILL)
    still.cancel()
    seen["canceled"] = until_ended(still)
    seen["secret"] = replicate.webhooks.default.secret().key
    seen["account"] = replicate.default_client.accounts.current().type
    seen["described"] = replicate.models.get(MODEL).name
    try:
        replicate.run(MODEL, {"prompt": "[moderated]"})
    except ModelError as error:
        seen["failed"] = error.prediction.error
    try:
        replicate.models.predictions.create(MODEL, {"prompt": "[refuse]"})
    except ReplicateError as error:
        seen["refused"] = [error.status, error.title]
    return seen


async def async_session() -> dict[str, Any]:
    made = await replicate.models.predictions.async_create(MODEL, INPUT, wait=False)
    await made.async_wait()
    run = await replicate.async_run(MODEL, INPUT, use_file_output=False)
    return {"model": [made.status, made.output, made.version], "run": str(run)}


if __name__ == "__main__":
    assert os.environ["REPLICATE_BASE_URL"]
    print(json.dumps({"sync": sync_session(), "async": asyncio.run(async_session())}))  # noqa: T201
