"""What a handler author needs in tests: events, one run of a handler, and a whole receiver.

`run` calls a handler once, without a database or a network:

```python
from receiver.testing import make_event, run


def test_announces_the_picture() -> None:
    event = make_event("succeeded", output=["https://cdn.example/a.png"])
    result = run(announce, event, files={"https://cdn.example/a.png": PNG})
    assert result.state == "done"
```

`Kit` is the real receiver on a temporary database, among providers that say what they are told to.
pytest gives one by the fixture `receiver_kit`, which this package brings along:

```python
def test_announces_once(receiver_kit: Callable[..., Kit]) -> None:
    kit = receiver_kit(announce, http=chat)
    delivered = kit.deliver(make_event("succeeded"), times=2)
    assert delivered.delivery.state == "done"
```
"""

from receiver.testing.events import make_event
from receiver.testing.kit import Clock, Delivered, Kit
from receiver.testing.single import Result, run

__all__ = ["Clock", "Delivered", "Kit", "Result", "make_event", "run"]
