"""The publisher over real servers: outages, rejected events, a failing disk, the end."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from stream.backoff import Backoff
from stream.clock import SystemClock
from stream.errors import SpoolError
from stream.publisher import Publisher
from stream.sinks.redis import RedisSink
from stream.sinks.spool import Spool

FAST = Backoff(first_s=0.01, longest_s=0.1)


class Rig:
    """A publisher on a real server, a real spool and the real clock."""

    def __init__(self, server: Any, folder: Path, **options: Any) -> None:
        self.told: list[tuple[str, bool, bool]] = []
        self.url = server.url
        self.path = folder / "spool.db"
        # Short where a server is frozen; elsewhere a slow machine must not look like an outage.
        timeout_s = options.pop("timeout_s", 60.0)
        self.sink = RedisSink(self.url, timeout_s=timeout_s, connect_timeout_s=timeout_s)
        clock = SystemClock()
        self.spool = Spool(self.path, clock=clock, max_bytes=options.pop("max_bytes", 1 << 24))
        options = {"backoff": FAST, "resend_s": 600.0, **options}
        self.publisher = Publisher(self.sink, self.spool, clock=clock, observer=self, **options)
        self.running = asyncio.create_task(self.publisher.run())

    def on_published(self, event: Any, mono_ns: int, wall_ns: int, *, new: bool, spooled: bool) -> None:
        assert abs(wall_ns - mono_ns - (SystemClock().wall_ns() - SystemClock().monotonic_ns())) < 60 * 10**9
        self.told.append((event.id, new, spooled))

    def all_told(self, count: int) -> Any:
        return lambda: len(self.told) + self.publisher.quarantined >= count

    async def end(self, grace_s: float = 60.0) -> None:
        try:
            await self.publisher.aclose(grace_s)
            await self.running
        finally:
            await self.sink.aclose()


async def _seqs(redis: Any, kind: str = "action", source: str = "gate") -> list[int]:
    entries = await redis.xrange(f"sightwire:events:{kind}")
    return [json.loads(f["data"])["seq"] for _, f in entries if f["source"] == f"/sources/{source}"]


async def test_events_go_straight_through(server: Any, redis: Any, tmp_path: Path, make_event: Any) -> None:
    rig = Rig(server, tmp_path)
    await rig.publisher.put([make_event(0), make_event(1)])
    await rig.publisher.put([make_event(0), make_event(0, kind="class")])
    await rig.end()
    assert await _seqs(redis) == [0, 1]
    assert rig.publisher.published == {"action": 2, "class": 1}
    assert (rig.publisher.duplicates, rig.publisher.spooled, rig.spool.count) == (1, 0, 0)
    assert [new for _, new, _ in rig.told] == [True, True, False, True]
    assert not any(spooled for _, _, spooled in rig.told)


async def test_nothing_is_lost_doubled_or_reordered_by_a_kill_and_a_freeze(
    server: Any, redis: Any, tmp_path: Path, make_event: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(server, tmp_path, timeout_s=0.2)
    sources = ("gate", "yard")
    done = [f"{source}-action-{{}}" for source in sources]

    def acknowledged(number: int) -> Any:
        return lambda: {name.format(number) for name in done} <= {event_id for event_id, _, _ in rig.told}

    async def feed(start: int, stop: int) -> None:
        for number in range(start, stop):
            await rig.publisher.put([make_event(number, source=source) for source in sources])
            await asyncio.sleep(0.0005)

    await feed(0, 100)
    await server.kill()
    await feed(100, 200)
    await eventually(lambda: rig.publisher.failures["connection"])
    await server.restart()
    await eventually(acknowledged(199))
    await feed(200, 250)
    timeouts = rig.publisher.failures["timeout"]
    server.freeze()
    await feed(250, 500)
    await eventually(lambda: rig.publisher.failures["timeout"] > timeouts)
    server.thaw()
    await feed(500, 600)
    await eventually(acknowledged(599))
    await rig.end()
    for source in sources:
        assert await _seqs(redis, source=source) == list(range(600))
    publisher = rig.publisher
    assert publisher.accepted == 1200
    assert publisher.accepted + publisher.resent == publisher.published.total() + publisher.duplicates
    assert publisher.spooled > 0
    assert {"connection", "timeout"} <= set(publisher.failures)
    assert rig.spool.count == 0
    assert "Redis at redis://127.0.0.1" in caplog.text


async def test_what_a_restarted_server_forgot_is_sent_again(
    server: Any, redis: Any, tmp_path: Path, make_event: Any, eventually: Any
) -> None:
    """A crash can cost a server the tail that it had acknowledged but not yet written."""
    rig = Rig(server, tmp_path)
    await rig.publisher.put([make_event(number) for number in range(10)])
    await eventually(rig.all_told(10))
    for entry_id, fields in await redis.xrevrange("sightwire:events:action", count=4):
        await redis.xdel("sightwire:events:action", entry_id)
        await redis.delete(f"sightwire:seen:{{sightwire:events:action}}:{fields['id']}")
    await redis.client_kill_filter(_type="normal", skipme=True)
    await rig.publisher.put([make_event(10)])
    await eventually(rig.all_told(21))
    await rig.end()
    assert await _seqs(redis) == list(range(11))
    assert rig.publisher.published == {"action": 15}
    assert (rig.publisher.resent, rig.publisher.duplicates) == (10, 6)


async def test_events_left_in_the_spool_go_first_at_the_next_start(
    server: Any, redis: Any, tmp_path: Path, make_event: Any, eventually: Any
) -> None:
    server.freeze()
    rig = Rig(server, tmp_path, timeout_s=0.2)
    await rig.publisher.put([make_event(number) for number in range(20)])
    await rig.end(grace_s=0.05)
    assert rig.spool.count == 20
    await rig.publisher.put([make_event(20)])  # too late for the sink: to the spool
    server.thaw()
    again = Rig(server, tmp_path)
    await again.publisher.put([make_event(21)])
    await eventually(again.all_told(22))
    await again.end()
    assert again.publisher.recovered == 21
    assert await _seqs(redis) == list(range(22))
    assert sum(new for _, new, _ in again.told) + again.publisher.duplicates == 22


async def test_a_cancelled_publisher_leaves_its_events_in_the_spool(
    server: Any, redis: Any, tmp_path: Path, make_event: Any
) -> None:
    server.freeze()
    rig = Rig(server, tmp_path)
    await rig.publisher.put([make_event(number) for number in range(5)])
    await asyncio.sleep(0.02)
    rig.running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rig.running
    server.thaw()
    assert rig.spool.count == 5
    await rig.sink.aclose()


async def test_an_end_before_the_start_keeps_the_events(server: Any, tmp_path: Path, make_event: Any) -> None:
    spool = Spool(tmp_path / "spool.db", clock=SystemClock())
    sink = RedisSink(server.url, timeout_s=60.0)
    publisher = Publisher(sink, spool, clock=SystemClock())
    await publisher.put([make_event(1)])
    await publisher.aclose()
    assert spool.count == 1
    await sink.aclose()


async def test_a_rejected_event_is_put_aside_and_blocks_nothing(
    server: Any, redis: Any, tmp_path: Path, make_event: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.set("sightwire:events:class", "not a stream")
    rig = Rig(server, tmp_path)
    events = [make_event(number, kind="class" if number % 10 == 3 else "action") for number in range(30)]
    events[7] = make_event(7, bad=float("nan"))
    await rig.publisher.put(events)
    await eventually(rig.all_told(30))
    assert await _seqs(redis) == [n for n in range(30) if n % 10 != 3 and n != 7]
    assert (rig.publisher.quarantined, rig.spool.quarantined) == (4, 4)
    assert rig.publisher.failures["rejected"] == 4
    assert "event gate-class-3 of /sources/gate is put aside" in caplog.text
    await redis.delete("sightwire:events:class")
    await rig.spool.requeue()
    await rig.publisher.put([make_event(30)])
    await eventually(rig.all_told(34))
    await rig.end()
    assert await _seqs(redis, "class") == [3, 13, 23]


async def test_a_password_changed_in_mid_run_loses_nothing(
    server: Any, redis: Any, tmp_path: Path, make_event: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(server, tmp_path)
    await rig.publisher.put([make_event(0)])
    await eventually(rig.all_told(1))
    await redis.config_set("requirepass", "other")
    await redis.execute_command("AUTH", "other")
    await redis.client_kill_filter(_type="normal", skipme=True)
    await rig.publisher.put([make_event(1)])
    await eventually(lambda: rig.publisher.failures["auth"] >= 2)
    assert rig.spool.count == 2
    assert rig.publisher.last_error is not None
    assert "password" in str(rig.publisher.last_error)
    await redis.config_set("requirepass", "")
    await eventually(rig.all_told(3))
    await rig.end()
    assert await _seqs(redis) == [0, 1]
    assert rig.publisher.last_error is None
    assert caplog.text.count("refused the user name") == 1, "one line, not one per attempt"


async def test_a_full_spool_holds_put_back_and_drops_nothing(
    server: Any, redis: Any, tmp_path: Path, make_event: Any, eventually: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server.freeze()
    rig = Rig(server, tmp_path, timeout_s=0.2, capacity=8, max_bytes=1 << 19)
    blob = "x" * 20_000

    async def feed() -> None:
        for number in range(100):
            await rig.publisher.put([make_event(number, blob=blob)])

    feeding = asyncio.create_task(feed())
    await eventually(lambda: rig.publisher.failures["spool"] > 0 and rig.publisher.pending == 8)
    assert not feeding.done()
    assert "full at 0 MB" in caplog.text
    assert "held in memory" in caplog.text
    server.thaw()
    await feeding
    await eventually(rig.all_told(100))
    await rig.end()
    assert await _seqs(redis) == list(range(100))


async def test_an_end_with_neither_sink_nor_disk_says_what_is_lost(
    server: Any, tmp_path: Path, make_event: Any, eventually: Any
) -> None:
    server.freeze()
    rig = Rig(server, tmp_path, timeout_s=0.2, max_bytes=1 << 19)
    await rig.publisher.put([make_event(number, blob="x" * 20_000) for number in range(60)])
    with pytest.raises(SpoolError, match="60 events are lost"):
        try:
            await rig.end(grace_s=0.05)
        finally:
            server.thaw()


async def test_a_spool_in_use_stops_the_start(server: Any, tmp_path: Path, make_event: Any, eventually: Any) -> None:
    rig = Rig(server, tmp_path)
    await rig.publisher.put([make_event(0)])
    await eventually(rig.all_told(1))
    second = Rig(server, tmp_path)
    with pytest.raises(SpoolError, match="another Sightwire"):
        await second.running
    await second.sink.aclose()
    await rig.end()


async def test_a_killed_server_process_that_never_returns_does_not_hold_up_the_end(
    server: Any, tmp_path: Path, make_event: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    os.kill(server.pid, signal.SIGKILL)
    rig = Rig(server, tmp_path)
    await rig.publisher.put([make_event(1)])
    await asyncio.wait_for(rig.end(grace_s=600), 60)
    assert rig.spool.count == 1


def test_backoff_grows_to_its_bound_and_is_spread() -> None:
    backoff = Backoff(first_s=0.1, longest_s=5.0)
    assert [round(backoff.delay_s(n, 1.0), 2) for n in (1, 2, 3, 6, 7, 1000)] == [0.1, 0.2, 0.4, 3.2, 5.0, 5.0]
    assert backoff.delay_s(3, 0.0) == 0.2
