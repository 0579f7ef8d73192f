"""Post every outcome to Slack, with its files, in one message.

Use: `SLACK_TOKEN=xoxb-… SLACK_CHANNEL=C0123456789 receiver serve save slack`.

A prediction's metadata may name another channel as `slack_channel`, and as `slack_thread` the `ts`
of the message to answer. Slack does not detect repeats: a message may be posted twice if Slack's
answer was lost. Orders from Slack are answered by `slack-in`.
"""

from functools import partial
from typing import Any

from receiver import Context, Event, Skip, on, read_settings

from ._slack import Slack, blocks_of, escape, shortened

CHANNELS, THREADS = r"[A-Z][A-Z0-9]+", r"\d+\.\d{6}"

with read_settings() as read:
    TOKEN = read.secret(
        "SLACK_TOKEN",
        "a bot's token (xoxb-…) with the scopes chat:write and files:write",
        r"xox[\w.-]+",
    )
    CHANNEL = read.matching("SLACK_CHANNEL", "an id like C0123456789 (not a name)", CHANNELS)
    TEMPLATE = read.template(
        "SLACK_TEXT",
        "what to say: a Template in Slack's mrkdwn",
        default="*{type}*: {prompt:.1000}\n{error:.500}{text:.1200}",
    )
    MOST_BYTES = read.size(
        "SLACK_MAX_BYTES", "the largest result to post; larger ones are linked", default="100MB"
    )
    URL = read.url(
        "SLACK_URL", "where Slack's API is", default="https://slack.com/api", secure=True
    )

SLACK = Slack(TOKEN, URL, MOST_BYTES)


@on("*", name="slack", timeout=600, after="save")
async def slack(event: Event, ctx: Context) -> None:
    if event.prediction.order and event.prediction.order.via == "in/slack":
        raise Skip("slack-in answers what was ordered in Slack")
    files, links = await SLACK.files(event, ctx)
    await ctx.once("post", partial(post, event, ctx, files, links))


async def post(event: Event, ctx: Context, files: list[Any], links: list[str]) -> None:
    filled = event.prediction.warning(escape) + TEMPLATE.fill(event, escape).strip()
    text = shortened(filled or event.type)
    channel = event.prediction.named("slack_channel", CHANNELS) or CHANNEL
    thread = event.prediction.named("slack_thread", THREADS)
    await SLACK.post(ctx.http, channel, thread, text, blocks_of(event, text, links), files)
