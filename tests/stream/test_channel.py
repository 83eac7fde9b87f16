"""The channel: bounded, accounted for, and never a lost wake-up."""

from __future__ import annotations

import asyncio
import threading

import pytest

from stream.accounting import Hop
from stream.channel import Channel, Policy
from stream.types import Stopped


def make(policy: Policy, capacity: int = 4) -> tuple[Channel[int], Hop]:
    hop = Hop()
    # Negative numbers stand for control items.
    return Channel[int](hop, capacity, policy, lambda item: item >= 0), hop


async def read_all(channel: Channel[int]) -> list[int]:
    out: list[int] = []
    while (items := await channel.get_many()) is not None:
        out += items
    return out


async def test_a_blocked_producer_loses_nothing() -> None:
    channel, hop = make(Policy.BLOCK)

    def produce() -> None:
        for number in range(2000):
            channel.put(number)
        channel.close()

    thread = threading.Thread(target=produce)
    thread.start()
    assert await read_all(channel) == list(range(2000))
    await asyncio.to_thread(thread.join)
    assert (hop.entered, hop.left, hop.held) == (2000, 2000, 0)


async def test_a_full_live_channel_drops_the_oldest_media_and_no_control_item() -> None:
    channel, hop = make(Policy.DROP_OLDEST)
    for item in (-1, 0, 1, 2, 3, 4, -2, 5):
        channel.put(item)
    channel.close()
    assert await read_all(channel) == [-1, 4, -2, 5]
    assert hop.dropped == {"overflow": 4} and hop.held == 0


async def test_reading_times_out_and_goes_on() -> None:
    channel, _ = make(Policy.BLOCK)
    assert await channel.get_many(0) == []
    channel.put(1)
    assert await channel.get_many(1.0) == [1]


async def test_stop_ends_a_blocked_producer() -> None:
    channel, hop = make(Policy.BLOCK, capacity=1)
    outcome: list[str] = []

    def produce() -> None:
        try:
            while True:
                channel.put(1)
        except Stopped:
            outcome.append("stopped")
            channel.close()

    thread = threading.Thread(target=produce)
    thread.start()
    channel.stop()
    await asyncio.to_thread(thread.join)
    await read_all(channel)
    assert outcome == ["stopped"] and hop.held == 0
    with pytest.raises(Stopped):
        channel.put(2)
    channel.put_now(-1)
    assert await channel.get_many() == [-1]


async def test_a_live_producer_that_is_told_to_end_hands_over_what_it_has() -> None:
    channel, hop = make(Policy.DROP_OLDEST)
    channel.put(1)
    channel.stop()
    channel.put(2)
    channel.close()
    with pytest.raises(Stopped):
        channel.put(3)
    assert await read_all(channel) == [1, 2]
    assert (hop.entered, hop.left, hop.held) == (2, 2, 0)
