"""Write one line to the log for every outcome. Use: `receiver serve log`."""

from receiver import Context, Event, on


@on("*", name="log")
async def log(event: Event, ctx: Context) -> None:
    prediction = event.prediction
    ctx.log.info(
        event.type,
        provider=prediction.provider,
        model=prediction.model,
        channel=event.channel,
        outputs=len(prediction.output or []),
        error=prediction.error and prediction.error.code,
    )
