"""Tests over all interleavings, for pytest: a decorator, the host that it hands to a test, and a plugin.

```python
import septum

@septum.explore()
def test_two_tasks_may_meet(host):
    lock, counter = Mutex("lock"), Counter("counter")

    async def add():
        async with lock.locked():
            counter.value += 1

    host.spawn(add)
    host.spawn(add)
    host.at_end(lambda: counter.value == 2, "both were counted")
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from septum.testing.exploration import Counterexample as Counterexample
    from septum.testing.exploration import explore as explore
    from septum.testing.host import Host as Host


def __getattr__(name: str) -> Any:
    """Imports what is asked for: the plugin is loaded in every run of pytest, and most do without."""
    from importlib import import_module  # noqa: PLC0415

    places = {"Counterexample": "exploration", "explore": "exploration", "Host": "host"}
    if name not in places:
        raise AttributeError(f"module 'septum.testing' has no attribute {name!r}")
    return getattr(import_module(f"septum.testing.{places[name]}"), name)
