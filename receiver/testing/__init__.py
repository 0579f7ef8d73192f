"""Tools for tests of handlers: events, one run of a handler, and a whole receiver.

`run` calls a handler once, without a database or a network:

```python
from receiver.testing import make_event, run


def test_announces_the_picture() -> None:
    event = make_event("succeeded", output=["https://cdn.example/a.png"])
    result = run(announce, event, files={"https://cdn.example/a.png": PNG})
    assert result.state == "done"
```

`Kit` is the real receiver with a temporary database and emulated providers.
The pytest fixture `receiver_kit`, which this package installs, creates one:

```python
def test_announces_once(receiver_kit: Callable[..., Kit]) -> None:
    kit = receiver_kit(announce, http=chat)
    delivered = kit.deliver(make_event("succeeded"), times=2)
    assert delivered.delivery.state == "done"
```

With `chats=True`, Slack, Discord and Telegram are emulated too:

```python
def test_replies_once(receiver_kit: Callable[..., Kit]) -> None:
    recipes = {"RECEIVER_RECIPES": "recipes.toml"}
    kit = receiver_kit("slack-in", "slack", chats=True, settings=recipes)
    said = kit.says("/imagine a lighthouse", person="U1", place="C1", on="slack")
    assert len(said.reply.pictures) == 1
```
"""

from receiver.testing.chat import Said
from receiver.testing.delivered import Delivered
from receiver.testing.events import make_event
from receiver.testing.kit import Kit
from receiver.testing.life import Clock
from receiver.testing.single import Result, run

__all__ = ["Clock", "Delivered", "Kit", "Result", "Said", "make_event", "run"]
