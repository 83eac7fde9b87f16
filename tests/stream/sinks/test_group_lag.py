"""How far consumer groups are behind, as the metrics tell it."""

from __future__ import annotations

from stream.sinks.redis import RedisSink
from tests.stream.sinks.conftest import MakeEvent, Server


async def test_lag_is_what_a_group_was_not_given(server: Server, make_event: MakeEvent) -> None:
    sink = RedisSink(server.url)
    assert await sink.group_lags(["action", "class"]) == {}
    await sink.publish([make_event(0)])
    await sink._client.xgroup_create("sightwire:events:action", "alarms", id="0")
    await sink.publish([make_event(n) for n in range(1, 4)])
    assert await sink.group_lags(["action", "class"]) == {("action", "alarms"): 4}
    await sink._client.xreadgroup("alarms", "one", {"sightwire:events:action": ">"}, count=2)
    assert await sink.group_lags(["action"]) == {("action", "alarms"): 2}
    (_, second, *_), _ = zip(*await sink._client.xrange("sightwire:events:action"), strict=True)
    await sink._client.xgroup_create("sightwire:events:action", "middle", id=second)
    assert ("action", "middle") not in await sink.group_lags(["action"]), "the server cannot tell"
    await sink.aclose()
