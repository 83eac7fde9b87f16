"""The bounded hop from a source's thread into the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Generic, TypeVar

from stream.accounting import Hop
from stream.types import Stopped

T = TypeVar("T")


class Policy(Enum):
    """What a full channel does."""

    BLOCK = "block"
    """Makes the producer wait (recordings: nothing is lost)."""
    DROP_OLDEST = "drop_oldest"
    """Drops the oldest item that may be dropped (live: freshness beats completeness)."""


class Channel(Generic[T]):
    """A bounded queue with one producing thread and one consuming task; every item is accounted for.

    ``droppable`` says which items may be dropped when the policy allows it; the others always get in, so
    the bound may be passed by control items, of which a source emits only a few.
    """

    def __init__(self, hop: Hop, capacity: int, policy: Policy, droppable: Callable[[T], bool]) -> None:
        self._hop = hop
        self._capacity = capacity
        self._policy = policy
        self._droppable = droppable
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        self._readable = asyncio.Event()
        self._signalled = False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """Add an item from the producing thread; blocks or drops when full.

        Raises ``Stopped`` once the consumer has asked a producer to end that waits for it. One that never waits ends
        by itself, so that what it had received is still taken; only once the channel is closed it is stopped too.
        """
        with self._changed:
            if self._policy is Policy.BLOCK:
                self._changed.wait_for(lambda: self._stopped or len(self._items) < self._capacity)
            if self._closed or (self._stopped and self._policy is Policy.BLOCK):
                raise Stopped
            self._hop.entered += 1
            if len(self._items) >= self._capacity:
                self._drop_oldest()
            self._items.append(item)
            self._hop.holds(self.__len__)
            self._signal()

    def put_now(self, item: T) -> None:
        """Add a control item whatever the bound, and even after ``stop``. From any thread."""
        with self._changed:
            self._hop.entered += 1
            self._items.append(item)
            self._signal()

    def _drop_oldest(self) -> None:
        for position, item in enumerate(self._items):
            if self._droppable(item):
                del self._items[position]
                self._hop.drop("overflow")
                return

    def _signal(self) -> None:
        if self._signalled:
            return
        self._signalled = True
        try:
            self._loop.call_soon_threadsafe(self._readable.set)
        except RuntimeError:
            # The loop is gone: the process is ending, nobody will read.
            self._stopped = self._closed = True

    def close(self) -> None:
        """The producer has ended: what is inside can still be read. From any thread."""
        with self._changed:
            self._closed = True
            self._signal()

    def stop(self) -> None:
        """Tell the producer to end: its next ``put`` raises ``Stopped`` if it could wait there. From any thread."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    async def get_many(self, timeout_s: float | None = None) -> list[T] | None:
        """All items inside, at least one unless ``timeout_s`` ran out; ``None`` once closed and empty."""
        if not self._signalled:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._readable.wait()
            except TimeoutError:
                return []
        await self._readable.wait()
        with self._changed:
            self._readable.clear()
            self._signalled = False
            items = list(self._items)
            self._items.clear()
            self._hop.left += len(items)
            self._hop.holds(self.__len__)
            if self._closed:
                self._signal()
                if not items:
                    return None
            self._changed.notify_all()
        return items
