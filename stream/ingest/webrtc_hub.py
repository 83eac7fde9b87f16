"""Who publishes to which source: where the HTTP side and the sources' threads meet."""

from __future__ import annotations

import threading

from stream.ingest.webrtc_inbox import Inbox
from stream.types import StopFlag

POLL_S = 0.25
"""How often a source that waits for its publisher looks at its stop flag."""


class NotExpected(Exception):
    """Nobody can publish to the source now; the message says why."""


class Publications:
    """One publication for each source at most. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inboxes: dict[str, Inbox] = {}

    def offer(self, source_id: str, inbox: Inbox) -> None:
        """A publisher is there for a source. Raises ``NotExpected`` when it has one."""
        with self._changed:
            if source_id in self._inboxes:
                raise NotExpected(f"source {source_id} is being published to already; end that session first")
            self._inboxes[source_id] = inbox
            self._changed.notify_all()

    def is_taken(self, source_id: str) -> bool:
        """Whether a source has a publisher."""
        with self._changed:
            return source_id in self._inboxes

    def withdraw(self, source_id: str, inbox: Inbox) -> None:
        """A publisher has gone, or its source took enough."""
        with self._changed:
            if self._inboxes.get(source_id) is inbox:
                del self._inboxes[source_id]

    def forget(self, source_id: str) -> None:
        """A source runs no more: whoever publishes to it is told to go."""
        with self._changed:
            inbox = self._inboxes.pop(source_id, None)
        if inbox is not None:
            inbox.release()

    def wait(self, source_id: str, stop: StopFlag) -> Inbox | None:
        """The next publisher's media; ``None`` when told to stop before there is one."""
        with self._changed:
            while not stop.is_set():
                if (inbox := self._inboxes.get(source_id)) is not None:
                    return inbox
                self._changed.wait(POLL_S)
        return None
