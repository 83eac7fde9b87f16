"""A publisher whose pictures and sounds are captured at known times, in a process of its own.

Reads an SDP answer as one JSON line from its standard input, after it has written its offer as one to its output.
``python -m bench.webrtc_publisher SECONDS CODEC``
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from fractions import Fraction

import aioice.ice
import numpy as np
from aiortc import RTCConfiguration, RTCPeerConnection, RTCRtpSender, RTCSessionDescription
from aiortc.mediastreams import MediaStreamTrack
from av import AudioFrame, VideoFrame

SIZE = (640, 360)
FPS = 25
RATE = 48_000
CHUNK = 960
EVERY_S = 1.0
"""The picture lights up and a tone sounds, both at once, this often."""
LASTS_S = 0.2
NEVER = -1.0


def lit(at_s: float) -> bool:
    """Whether light and tone are on at a time of capture."""
    return at_s % EVERY_S < LASTS_S


class Clock:
    """Both tracks are captured by one clock, which starts with the first look at it."""

    def __init__(self) -> None:
        self._start_s = NEVER

    async def until(self, at_s: float) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._start_s == NEVER:
            self._start_s = now_s
        await asyncio.sleep(max(0.0, self._start_s + at_s - now_s))


class Pictures(MediaStreamTrack):
    """A moving picture that lights up."""

    kind = "video"

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._number = 0
        noise = np.random.default_rng(0).integers(0, 60, (SIZE[1], 2 * SIZE[0], 3), np.uint8)
        # A little coarser than noise: a scene that a coder finds something in.
        self._scene = np.repeat(np.repeat(noise[::8, ::8], 8, 0), 8, 1)

    async def recv(self) -> VideoFrame:
        """The next frame, when it is captured."""
        number, self._number = self._number, self._number + 1
        await self._clock.until(number / FPS)
        shift = number % SIZE[0]
        image = self._scene[:, shift : shift + SIZE[0]] + np.uint8(150 if lit(number / FPS) else 0)
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(format="yuv420p")
        frame.pts, frame.time_base = number, Fraction(1, FPS)
        return frame


class Sounds(MediaStreamTrack):
    """A tone now and then."""

    kind = "audio"

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._at = 0

    async def recv(self) -> AudioFrame:
        """The next 20 ms, when the last of them is captured: as microphones give them."""
        first, self._at = self._at, self._at + CHUNK
        await self._clock.until(first / RATE)
        at_s = np.arange(first, first + CHUNK) / RATE
        tone = np.where(at_s % EVERY_S < LASTS_S, 0.8 * np.cos(2 * np.pi * 1000 * at_s), 0.0)
        frame = AudioFrame.from_ndarray((tone * 32767).astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, first, Fraction(1, RATE)
        return frame


def _loopback() -> Callable[[bool, bool], list[str]]:
    return lambda use_ipv4, use_ipv6: ["127.0.0.1"]


async def publish(seconds: float, codec: str) -> None:
    """Offer, connect, send, leave."""
    aioice.ice.get_host_addresses = _loopback()
    connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    clock = Clock()
    transceiver = connection.addTransceiver(Pictures(clock), "sendonly")
    codecs = RTCRtpSender.getCapabilities("video").codecs
    transceiver.setCodecPreferences([found for found in codecs if found.name in (codec, "rtx")])
    connection.addTransceiver(Sounds(clock), "sendonly")
    await connection.setLocalDescription(await connection.createOffer())
    print(json.dumps(connection.localDescription.sdp), flush=True)
    answer = json.loads(await asyncio.to_thread(sys.stdin.readline))
    await connection.setRemoteDescription(RTCSessionDescription(answer, "answer"))
    await asyncio.sleep(seconds)
    await connection.close()


if __name__ == "__main__":
    asyncio.run(publish(float(sys.argv[1]), sys.argv[2]))
