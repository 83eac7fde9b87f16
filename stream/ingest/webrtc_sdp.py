"""What a publisher offers, checked before anything is set up for it.

aiortc's reader of SDP trusts what it reads: everything that it may raise is mapped here, in this one place.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from aiortc import RTCIceCandidate
from aiortc.sdp import MediaDescription, SessionDescription, candidate_from_sdp

CANDIDATES_LIMIT = 64
"""Candidates of one session: more would make this service send to many addresses on a publisher's behalf."""
_SENDS = ("sendonly", "sendrecv")
UNREADABLE = (ValueError, LookupError, AssertionError, AttributeError, TypeError, StopIteration)
"""What aiortc raises for text that is not what it expects."""

T = TypeVar("T")


class BadOffer(Exception):
    """Not SDP, or not of a WebRTC session; one line that says what is wrong."""


class UnusableOffer(Exception):
    """Sound SDP of something that cannot be taken; one line that says why."""


def _read(text: str, reader: Callable[[str], T]) -> T:
    try:
        return reader(text)
    except UNREADABLE:
        raise BadOffer("the SDP cannot be read; send what createOffer gives, unchanged") from None


@dataclass(frozen=True, slots=True)
class Offered:
    """What is offered, as far as it matters here."""

    video: bool
    audio: bool
    ice: tuple[str, str]
    """User name and password of ICE."""


def check_offer(text: str) -> Offered:
    """Read an offer. Raises ``BadOffer`` or ``UnusableOffer``."""
    description = _read(text, SessionDescription.parse)
    media = description.media
    if not media:
        raise BadOffer("the SDP has no media; offer a video or an audio track")
    for section in media:
        _check_section(section)
    for kind in ("video", "audio", "application"):
        if sum(section.kind == kind for section in media) > 1:
            raise UnusableOffer(f"more than one {kind} section; offer one camera and one microphone at most")
    if not _bundled(description):
        raise UnusableOffer("the sections are not bundled; use the bundle policy max-bundle")
    sent = {section.kind for section in media if section.direction in _SENDS and section.port != 0}
    if not sent & {"video", "audio"}:
        raise UnusableOffer("no track is sent; offer a video or an audio track in direction sendonly")
    return Offered("video" in sent, "audio" in sent, _ice(media[0]))


def _ice(section: MediaDescription) -> tuple[str, str]:
    ice = section.ice
    if ice is None or not ice.usernameFragment or not ice.password:
        raise BadOffer("the SDP has no ICE user name and password")
    return ice.usernameFragment, ice.password


def _check_section(section: MediaDescription) -> None:
    if section.kind not in ("video", "audio", "application"):
        raise UnusableOffer(f"sections of kind {section.kind[:20]!r} are not understood")
    _ice(section)
    if section.dtls is None or not section.dtls.fingerprints:
        raise BadOffer("the SDP has no DTLS fingerprint or role")
    if not section.rtp.muxId:
        raise BadOffer("the SDP has a section without an id (a=mid)")
    if len(section.ice_candidates) > CANDIDATES_LIMIT:
        raise UnusableOffer(f"more than {CANDIDATES_LIMIT} candidates")
    if section.kind != "application" and not section.rtcp_mux:
        raise UnusableOffer("RTCP is not multiplexed (a=rtcp-mux)")


def _bundled(description: SessionDescription) -> bool:
    """Whether all sections share one transport, or there is only one."""
    names = [section.rtp.muxId for section in description.media]
    bundles = [group.items for group in description.group if group.semantic == "BUNDLE"]
    if len(names) == 1:
        return bundles in ([], [names])
    return len(bundles) == 1 and sorted(bundles[0]) == sorted(set(names)) and len(set(names)) == len(names)


def without_names(offer: str) -> str:
    """The offer without candidates that give a name instead of an address, as browsers do that hide theirs (mDNS).

    Nothing is looked up on a publisher's behalf; its own checks tell where it is.
    """
    return "".join(
        line
        for line in offer.splitlines(keepends=True)
        if not line.startswith("a=candidate:") or _has_address(line.split())
    )


def _has_address(fields: list[str]) -> bool:
    try:
        ipaddress.ip_address(fields[4])
    except (ValueError, IndexError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class Fragment:
    """What a publisher adds to its offer later (RFC 8840)."""

    ice: tuple[str, str] | None
    """User name and password of ICE that the candidates belong to, where it says."""
    candidates: tuple[RTCIceCandidate, ...]
    complete: bool
    """Whether no more will come."""


def read_fragment(text: str) -> Fragment:
    """Read the body of a PATCH. Raises ``BadOffer``."""
    names: dict[str, str] = {}
    candidates = []
    found = complete = False
    for line in text.splitlines():
        attribute, _, value = line.strip().removeprefix("a=").partition(":")
        match attribute:
            case "ice-ufrag" | "ice-pwd":
                names.setdefault(attribute, value)
            case "candidate":
                found = True
                candidate = _read(value, candidate_from_sdp)
                if _has_address(value.split()):
                    candidates.append(candidate)
            case "end-of-candidates":
                complete = True
    if len(names) == 1 or not (names or found or complete):
        raise BadOffer("not a fragment of SDP with ICE candidates")
    return Fragment((names["ice-ufrag"], names["ice-pwd"]) if names else None, tuple(candidates), complete)
