"""What `sightwire events` reads from a real server."""

from __future__ import annotations

from typing import Any

from stream.received import ReceivedEvent
from stream.settings import load_settings
from stream.sinks.redis import RedisSink
from stream.tail import show_events


async def test_how_many_there_were_is_told(server: Any, make_event: Any) -> None:
    settings = load_settings(None, {"redis": {"url": server.url}})
    sink = RedisSink(server.url)
    await sink.publish([make_event(1), make_event(2, source="yard"), make_event(3, kind="class")])
    await sink.aclose()

    async def shown(**only: Any) -> tuple[int | None, int]:
        events: list[ReceivedEvent] = []
        asked = {"kinds": None, "sources": None, "last": 20, **only}
        found = await show_events(settings, events.append, following=False, prefix="sightwire", **asked)
        return found, len(events)

    assert await shown() == (3, 3)
    assert await shown(last=2) == (2, 2)
    assert await shown(sources=["yard"]) == (1, 1)
    assert await shown(kinds=["segmentation"]) == (0, 0)
    assert await shown(sources=["nobody"]) == (0, 0)
