from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from tests.e2e.rtsp_server import CannotServe, RtspServer

StartRtspServer = Callable[..., RtspServer]


def missing(what: str) -> NoReturn:
    """Skip, or fail where everything must be there."""
    if os.environ.get("SIGHTWIRE_REQUIRE_E2E") == "1":
        pytest.fail(f"SIGHTWIRE_REQUIRE_E2E=1, but {what}")
    pytest.skip(what)


@pytest.fixture
def rtsp_server() -> Iterator[StartRtspServer]:
    """Starts real RTSP servers: ``rtsp_server(file, "--loop", "--login", "user:password", …)``."""
    started: list[RtspServer] = []

    def start(file: Path, *options: str) -> RtspServer:
        try:
            server = RtspServer(file, *options)
        except CannotServe as error:
            missing(f"no RTSP server can be run: {error}")
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()
