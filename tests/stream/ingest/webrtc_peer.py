"""A real publisher: aiortc sends a clip over loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from aiortc import RTCConfiguration, RTCPeerConnection, RTCRtpSender, RTCSessionDescription
from aiortc.contrib.media import MediaPlayer


@pytest.fixture
def over_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """aioice leaves the loopback addresses out, as they lead nowhere from another machine."""
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


async def until(condition: Callable[[], bool], timeout_s: float = 180) -> None:
    """Wait for what must come true."""
    async with asyncio.timeout(timeout_s):
        while True:
            if condition():
                return
            await asyncio.sleep(0.02)


class Peer:
    """Offers a clip's tracks. Made on an event loop, which runs it."""

    def __init__(self, clip: Path, *, video_codec: str | None = "VP8", audio: bool = True, loop: bool = False) -> None:
        self.connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self._player = MediaPlayer(str(clip), loop=loop)
        if video_codec is not None and self._player.video is not None:
            transceiver = self.connection.addTransceiver(self._player.video, "sendonly")
            codecs = RTCRtpSender.getCapabilities("video").codecs
            transceiver.setCodecPreferences([c for c in codecs if c.name in (video_codec, "rtx")])
        if audio and self._player.audio is not None:
            self.connection.addTransceiver(self._player.audio, "sendonly")
        self.texts = self.connection.createDataChannel("text")

    async def offer(self) -> str:
        """SDP with all candidates."""
        await self.connection.setLocalDescription(await self.connection.createOffer())
        return str(self.connection.localDescription.sdp)

    async def answered(self, answer: str) -> None:
        """Connect to whoever answered."""
        await self.connection.setRemoteDescription(RTCSessionDescription(answer, "answer"))

    async def say(self, text: str) -> None:
        """Send a text, as soon as that is possible."""
        await until(lambda: self.texts.readyState != "connecting")
        self.texts.send(text)

    async def aclose(self) -> None:
        """Leave."""
        for track in (self._player.video, self._player.audio):
            if track is not None:
                track.stop()
        await self.connection.close()


@contextlib.asynccontextmanager
async def publishing(clip: Path, **options: object) -> AsyncIterator[Peer]:
    """A peer that is closed at the end of the block."""
    peer = Peer(clip, **options)  # type: ignore[arg-type]
    try:
        yield peer
    finally:
        await peer.aclose()
