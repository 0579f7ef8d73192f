"""Emulators of the providers and of Slack, Discord and Telegram, with fault injection.

`create_emulator(options)` returns an ASGI app; `settings_for(base_url)` the environment that points
a receiver at it. `inprocess.EmulatedProviders` is the same without a socket, for tests: there a
test ends each prediction. Pictures are drawn from the prompt's hash and served under `/files/`. The
chat platforms, and the routes for typing and pressing buttons there, are in `chats`.

Words in a prompt determine what happens to a prediction:

    [fail]        the model fails
    [timeout]     the model runs out of time
    [moderated]   the content policy stops it (Ideogram: a picture without a URL)
    (no prompt)   the model fails, unless the input has an image or a video
    [refuse]      the submit is refused: the balance is used up
    [slow]        it takes ten times as long
    [fast]        it takes no time
    [never]       it never ends
    [text]        the model answers in words: no picture (not at Oxen, Ideogram and BFL)
    [<fault>]     the fault of that name affects it, for example [lose_callback]

The models `no-such-model` and `text-only` are refused; every other name makes pictures.

Control, under `/_emulator`:

    PUT /faults      replace the rules: [{"fault", "provider"?, "match"?, "times"?, "probability"?}]
    GET /faults      the rules in force, with the times they still apply
    DELETE /faults   remove all rules
    GET /ledger      predictions, request counts and violations; `?limit=`: only the latest

Faults, with the fields that are specific to each (and their defaults):

    lose_callback      no callback is sent; nothing is retried
    lose_event         the same, for Oxen's stream only
    repeat_callback    `copies` (3) are sent
    delay_callback     it is sent `seconds` (3) late
    reorder_callbacks  it is sent after the next one, or after `seconds` (2)
    early_callback     it is sent before the submit is answered, which waits `seconds` (1) at most
    refuse_submit      `status` (503), `retry_after` and `reason`; not billed
    lock_account       fal answers submits 403, "User is locked", with `reason`; polls go on
    reserve_money      Eachlabs answers submits 402 while another prediction is unfinished
    late_success       Eachlabs sends the callback of a success after a cancellation
    drop_submit        the connection is closed; not billed
    stall_submit       billed; the connection is closed without an answer after `seconds` (0)
    break_poll         `answer`: error (HTTP 500), garbage (no JSON) or missing (HTTP 404)
    break_jwks         the same `answer` to requests for key sets and webhook secrets
    rotate_keys        at once: the signing keys and secrets are replaced by new ones
    wrong_signature    callbacks are signed with a wrong key; Eachlabs sends a wrong secret
    stale_timestamp    their signature is `seconds` (600) old
    null_payload       fal's callback has a `payload_error` instead of the result
    large_output       pictures are data URIs with `size` (300,000) bytes added
    cut_stream         at once: every connection to Oxen's stream is closed
    silence_stream     the stream stays open and silent while the rule stands

For the chat platforms, `provider` is `slack`, `discord` or `telegram`, and `match` a part of the
call's name, such as `chat.` or `sendPhoto`:

    limit_call         HTTP 429, with `retry_after` (1)
    fail_call          HTTP 500
    drop_call          the connection is closed, and the call has no effect
    lose_answer        the connection is closed after the call has taken effect
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
