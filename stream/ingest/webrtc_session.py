"""One publisher's peer connection, from its offer to its end. Lives on the event loop."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable

from aiortc import (
    RTCConfiguration,
    RTCDataChannel,
    RTCIceServer,
    RTCPeerConnection,
    RTCRtpTransceiver,
    RTCSessionDescription,
)
from aiortc.exceptions import InvalidAccessError, InvalidStateError, OperationError

from stream.accounting import Ledger
from stream.clock import Clock
from stream.ingest.errors import Failure
from stream.ingest.webrtc_frames import MediaPacket
from stream.ingest.webrtc_inbox import Announced, Inbox, gone
from stream.ingest.webrtc_intake import Intake
from stream.ingest.webrtc_private import clock_rate, divert, listen_only_on, payload_codecs
from stream.ingest.webrtc_sdp import (
    CANDIDATES_LIMIT,
    UNREADABLE,
    BadOffer,
    Offered,
    UnusableOffer,
    check_offer,
    read_fragment,
    without_names,
)
from stream.ingest.webrtc_text import TEXT_CHANNEL
from stream.settings import WebRtcSettings

log = logging.getLogger(__name__)

CLOSE_S = 5.0
"""How long a connection may take to close."""


class IceRestart(Exception):
    """The publisher wants new ICE credentials, which is not supported."""


class Session:
    """Takes what one publisher sends into its inbox. ``ended`` is called once, when it is over, whatever ended it."""

    def __init__(
        self,
        source_id: str,
        settings: WebRtcSettings,
        addresses: tuple[str, ...] | None,
        clock: Clock,
        ledger: Ledger,
        ended: Callable[[Session], None],
    ) -> None:
        """``addresses`` are those of this machine to receive on; ``None`` for all but loopback."""
        self.source_id = source_id
        self.inbox: Inbox | None = None
        """Its media; ``None`` before ``answer``."""
        self._settings = settings
        self._addresses = addresses
        self._clock = clock
        self._hop = ledger.hop(source_id, "webrtc_frames")
        self._text_hop = ledger.hop(source_id, "webrtc_texts")
        self._ended = ended
        self._intake: Intake | None = None
        self._ice: tuple[str, str] | None = None
        self._candidates = 0
        self._etag = ""
        self._over = False
        self._closing: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._deadline: asyncio.TimerHandle | None = None
        self._connection = RTCPeerConnection(RTCConfiguration(iceServers=_ice_servers(settings)))
        self._connection.on("connectionstatechange", self._state_changed)
        self._connection.on("datachannel", self._take_channel)

    @property
    def etag(self) -> str:
        """Names the ICE session that candidates are added to."""
        return self._etag

    async def answer(self, offer: str) -> str:
        """The SDP that answers an offer; media may come from then on.

        Raises ``BadOffer`` or ``UnusableOffer``; the session must be closed then too.
        """
        offered = check_offer(offer)
        self._ice = offered.ice
        self._etag = hashlib.sha256("\0".join(offered.ice).encode()).hexdigest()[:16]
        self.inbox = Inbox(Announced(offered.video, offered.audio), self._hop, self._text_hop, self._released)
        try:
            await self._negotiate(offer, offered, Intake(self._clock, self.inbox, self._hop, self._text_hop))
        except OperationError:
            raise UnusableOffer("no codec in common; offer H.264 (baseline) or VP8, and Opus") from None
        except (*UNREADABLE, InvalidStateError, InvalidAccessError):
            raise BadOffer("the SDP contradicts itself; send what createOffer gives, unchanged") from None
        self._deadline = self._loop.call_later(self._settings.connect_timeout_s, self._not_connected)
        return str(self._connection.localDescription.sdp)

    async def _negotiate(self, offer: str, offered: Offered, intake: Intake) -> None:
        self._intake = intake
        await self._connection.setRemoteDescription(RTCSessionDescription(without_names(offer), "offer"))
        for transceiver in self._connection.getTransceivers():
            if (transceiver.kind == "video" and offered.video) or (transceiver.kind == "audio" and offered.audio):
                self._receive(transceiver, intake)
        if self._addresses is not None:
            listen_only_on(self._connection, self._addresses)
        await self._connection.setLocalDescription(await self._connection.createAnswer())

    async def trickle(self, body: str) -> None:
        """Take more candidates. Raises ``BadOffer``, ``UnusableOffer`` or ``IceRestart``."""
        fragment = read_fragment(body)
        if fragment.ice is not None and fragment.ice != self._ice:
            raise IceRestart("ICE cannot be restarted here; end the session and publish anew")
        if self._candidates + len(fragment.candidates) > CANDIDATES_LIMIT:
            raise UnusableOffer(f"more than {CANDIDATES_LIMIT} candidates")
        self._candidates += len(fragment.candidates)
        # Everything is bundled: whatever section they name, there is one transport.
        ice = self._connection.getTransceivers()[0].receiver.transport.transport
        for candidate in fragment.candidates:
            await ice.addRemoteCandidate(candidate)
        if fragment.complete:
            await ice.addRemoteCandidate(None)

    async def aclose(self, reason: Failure = Failure.ENDED, detail: str = "the publisher has ended it") -> None:
        """End it, for this reason; returns when nothing of it is left."""
        self._end(reason, detail)
        if self._closing is not None:
            await asyncio.wait({self._closing})

    def _end(self, reason: Failure, detail: str) -> None:
        """Whatever ends it comes through here, the first time with effect."""
        if self._over:
            return
        self._over = True
        if self._deadline is not None:
            self._deadline.cancel()
        if self._intake is not None:
            self._intake.close()
        if self.inbox is not None:
            self.inbox.end(gone(self.source_id, reason, detail))
        self._closing = self._loop.create_task(self._close(), name=f"close publisher of {self.source_id}")

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._connection.close()
        except TimeoutError:
            log.warning("source %s: a publisher's connection did not close in time", self.source_id)
        finally:
            self._ended(self)

    def _released(self) -> None:
        """The source takes no more; called on any thread."""
        try:
            self._loop.call_soon_threadsafe(self._end, Failure.ENDED, "the source has let it go")
        except RuntimeError:
            # The loop is gone, and everything with it.
            return

    def _not_connected(self) -> None:
        self._end(Failure.TIMEOUT, "the publisher did not connect in time; check that UDP gets through")

    def _state_changed(self) -> None:
        match self._connection.connectionState:
            case "connected":
                if self._deadline is not None:
                    self._deadline.cancel()
                if self.inbox is not None:
                    self.inbox.now_connected()
            case "failed":
                self._end(Failure.CONNECTION_LOST, "the connection to the publisher was lost")
            case "closed":
                self._end(Failure.ENDED, "the publisher has ended it")

    def _receive(self, transceiver: RTCRtpTransceiver, intake: Intake) -> None:
        codecs, rate = payload_codecs(transceiver), clock_rate(transceiver)
        if transceiver.kind == "video":
            intake.expect_video(codecs, rate)
            divert(transceiver, intake.video, intake.report, lambda: self._track_ended(intake.video_ended()))
            return

        def take(packet: MediaPacket) -> bool:
            intake.audio(packet)
            return False

        intake.expect_audio(codecs, rate)
        divert(transceiver, take, intake.report, lambda: self._track_ended(intake.audio_ended()))

    def _track_ended(self, was_last: bool) -> None:
        if was_last:
            self._end(Failure.ENDED, "the publisher has ended it")

    def _take_channel(self, channel: RTCDataChannel) -> None:
        if channel.label != TEXT_CHANNEL:
            log.info("source %s: a data channel that is not named %r is closed", self.source_id, TEXT_CHANNEL)
            channel.close()
            return
        channel.on("message", self._take_message)

    def _take_message(self, message: str | bytes) -> None:
        if self._intake is not None:
            self._intake.text(message)


def _ice_servers(settings: WebRtcSettings) -> list[RTCIceServer]:
    return [
        RTCIceServer(
            list(server.urls),
            server.username,
            None if server.credential is None else server.credential.get_secret_value(),
        )
        for server in settings.ice_servers
    ]
