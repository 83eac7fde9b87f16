"""A bug in the service ends it, so that whoever runs it can start it anew: it never hangs half dead."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from stream.clock import SystemClock
from stream.packs import load_packs
from stream.service import Service
from stream.settings import Settings, load_settings
from stream.types import Event

SCENE = "synthetic://scene?fps=25&width=64&height=36&seconds=12&brightness=0:0.2,4:1,8:0.2"


class _BrokenPort:
    """Fails at the first event of a window, once more waits for the engines than they may take.

    Of each source's two windows one may be computed out of turn, and four results may be on their way: of sixteen
    sources at least eleven windows come to wait.
    """

    service: Service

    async def put(self, events: Sequence[Event]) -> None:
        if all(event.kind == "source" for event in events):
            return
        while self.service._pool.waiting < 6:  # noqa: ASYNC110 - what is waited for is on the other tasks' way
            await asyncio.sleep(0.005)
        raise RuntimeError("a bug")


def _settings(tiny_pack: Path, threads: int) -> Settings:
    content: dict[str, Any] = {
        "sources": [{"id": f"cam{n}", "url": SCENE, "pace": "fast"} for n in range(16)],
        "packs": [{"name": str(tiny_pack), "backend": "onnxruntime"}],
        "engine": {"threads": threads, "max_batch": 1},
    }
    return load_settings(None, content)


def _engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("engine-")]


@pytest.mark.parametrize("threads", [1, 2])
async def test_a_bug_ends_the_service_whatever_waits_for_its_engines(
    tiny_pack: Path, tmp_path: Path, threads: int
) -> None:
    settings = _settings(tiny_pack, threads)
    port = _BrokenPort()
    port.service = service = Service(settings, load_packs(settings, tmp_path), port, SystemClock())
    with pytest.raises(ExceptionGroup) as raised:
        async with asyncio.timeout(120):
            await service.run()
    assert raised.value.subgroup(RuntimeError) is not None
    assert not _engine_threads()


class _Buggy:
    """An engine that fails by what no engine may."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def infer(self, inputs: Any) -> Any:
        raise RuntimeError("a bug")


class _Port:
    async def put(self, events: Sequence[Event]) -> None:
        """Takes them."""


async def test_a_bug_in_an_engine_thread_ends_the_service_and_whoever_waits_for_the_pack(
    tiny_pack: Path, tmp_path: Path
) -> None:
    settings = _settings(tiny_pack, 1)
    (pack,) = load_packs(settings, tmp_path)
    buggy = [
        replace(copy, engines=MappingProxyType({name: _Buggy(engine) for name, engine in copy.engines.items()}))
        for copy in pack.copies
    ]
    service = Service(settings, [replace(pack, copies=tuple(buggy))], _Port(), SystemClock())
    with pytest.raises(ExceptionGroup) as raised:
        async with asyncio.timeout(120):
            await service.run()
    assert raised.value.subgroup(RuntimeError) is not None
    assert not _engine_threads()
    async with asyncio.timeout(120):
        await service._pool.retire(service._generations["tiny"])
