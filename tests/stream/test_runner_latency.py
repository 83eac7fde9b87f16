"""What a whole run tells of the latency of its events."""

from __future__ import annotations

import asyncio
import faulthandler
import signal
from pathlib import Path

from stream.runner import Addresses, run
from stream.settings import Settings, load_settings
from stream.types import Event
from tests.stream.test_sources import LIVE


async def test_latency_is_measured_on_sources_that_come_later_too(tiny_pack: Path) -> None:
    def settings(*ids: str) -> Settings:
        content = {
            "sources": [{"id": name, "url": LIVE} for name in ids],
            "packs": [{"name": str(tiny_pack), "backend": "onnxruntime"}],
            "http": {"enabled": False},
            "stay": True,
            "shutdown_grace_s": 300,
        }
        return load_settings(None, content)

    asked: list[Event] = []

    def show(event: Event) -> None:
        if event.kind != "source" and not asked:
            asked.append(event)
            signal.raise_signal(signal.SIGTERM)

    def started(_: Addresses) -> None:
        signal.raise_signal(signal.SIGHUP)

    try:
        async with asyncio.timeout(120):
            summary = await run(settings(), show=show, started=started, reload=lambda: settings("late"))
    finally:
        faulthandler.cancel_dump_traceback_later()  # the signal's last resort, which would end the tests
    assert summary.events.total() > summary.events["source"] > 0
    assert len(summary.latencies_s) > 0
