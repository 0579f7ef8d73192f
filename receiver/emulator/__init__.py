"""The providers, and Slack, Discord and Telegram, on loopback: faithful, or hostile.

`create_emulator(options)` returns an ASGI app; `settings_for(base_url)` the environment that points
a receiver at it. `inprocess.EmulatedProviders` is the same without a socket, for tests: there a
test ends each prediction. Pictures are drawn from the prompt's hash and served under `/files/`. The
chat platforms, and the routes by which people type and press buttons there, are in `chats`.

Words in a prompt decide how a prediction goes:

    [fail]        the model fails
    [timeout]     the model runs out of time
    [moderated]   the content policy stops it (Ideogram: a picture without a URL)
    (no prompt)   the model misses it, unless there is an image or a video to work on
    [refuse]      the submit itself is refused: the balance is used up
    [slow]        it takes ten times as long
    [fast]        it takes no time
    [never]       it never ends
    [text]        the model answers in words: no picture (not at Oxen)
    [<fault>]     the fault of that name affects it, for example [lose_callback]

The models `no-such-model` and `text-only` are refused; every other name is drawn.

Control, under `/_emulator`:

    PUT /faults      replace the rules: [{"fault", "provider"?, "match"?, "times"?, "probability"?}]
    GET /faults      the rules in force, with the times they still apply
    DELETE /faults   peace
    GET /ledger      predictions, request counts and broken rules; `?limit=` for the latest only

Faults, with the fields that only they read (and their defaults):

    lose_callback      no callback is sent; nothing is retried
    lose_event         the same, for Oxen's stream only
    repeat_callback    `copies` (3) are sent
    delay_callback     it is sent `seconds` (3) late
    reorder_callbacks  it is sent after the next one, or after `seconds` (2)
    early_callback     it arrives before the submit is answered; waits up to `seconds` (1) for that
    refuse_submit      `status` (503), `retry_after` and `reason`; not billed
    lock_account       fal answers submits 403, "User is locked", with `reason`; polls go on
    reserve_money      Eachlabs answers submits 402 while another is at work
    late_success       Eachlabs calls back with a success after it has canceled
    drop_submit        the connection is closed; not billed
    stall_submit       billed, then silence for `seconds` (0), then the connection is closed
    break_poll         `answer`: error (HTTP 500), garbage (no JSON) or missing (HTTP 404)
    break_jwks         the same for key sets, and for the secrets of accounts that are shown
    rotate_keys        at once: what they sign with is withdrawn for a new one
    wrong_signature    callbacks are signed with another key; Eachlabs sends another secret
    stale_timestamp    their signature is `seconds` (600) old
    null_payload       fal could not put the result into the callback
    large_output       pictures come as data URIs, `size` (300,000) bytes longer than they are
    cut_stream         at once: every listener of Oxen's stream is dropped
    silence_stream     the stream stays open and silent while the rule stands

At the chat platforms, where `provider` is `slack`, `discord` or `telegram` and `match` is a part
of the call's name, as `chat.` or `sendPhoto`:

    limit_call         HTTP 429, with `retry_after` (1)
    fail_call          HTTP 500
    drop_call          nothing is done, and the connection is closed
    lose_answer        it is done, and the connection is closed
"""

from receiver.emulator.app import create_emulator, settings_for
from receiver.emulator.chats.platforms import environment as chat_settings_for
from receiver.emulator.faults import FAULTS, Rule
from receiver.emulator.options import Options, Schedule

__all__ = [
    "FAULTS",
    "Options",
    "Rule",
    "Schedule",
    "chat_settings_for",
    "create_emulator",
    "settings_for",
]
