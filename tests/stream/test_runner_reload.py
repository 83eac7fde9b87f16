"""Two signals to read the configuration again, one right after the other."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from stream.runner import Ending
from stream.settings import Settings, load_settings
from tests.stream.test_sources import LIVE, serving


async def test_the_newest_file_has_the_last_word(tiny_pack: Path, tmp_path: Path) -> None:
    """The first reading takes long; by the time it is done the file is another, and two more signals have come."""
    go_on = threading.Event()
    read: list[str] = []
    current = ["old"]

    def reload() -> Settings:
        name = current[0]
        read.append(name)
        if name == "old":
            assert go_on.wait(60)
        return load_settings(None, {"sources": [{"id": name, "url": LIVE}]})

    async with serving(tiny_pack, tmp_path, sources=[{"id": "first", "url": LIVE}]) as run, asyncio.timeout(60):
        ending = Ending(10)
        ending.attach(run.service, reload=reload)
        ending.hang_up()
        while not read:  # noqa: ASYNC110 - another thread tells
            await asyncio.sleep(0.01)
        current[0] = "new"
        ending.hang_up()
        ending.hang_up()
        go_on.set()
        while list(run.service.sources) != ["new"]:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
        assert read == ["old", "new"]
