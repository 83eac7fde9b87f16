"""Whatever a publisher sends as SDP, it is taken or refused in one line; nothing else happens."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import pytest
from aiortc import RTCConfiguration, RTCPeerConnection
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.accounting import Ledger
from stream.clock import SystemClock
from stream.ingest.webrtc_sdp import (
    CANDIDATES_LIMIT,
    BadOffer,
    UnusableOffer,
    check_offer,
    read_fragment,
    without_names,
)
from stream.ingest.webrtc_session import Session
from stream.settings import WebRtcSettings


def make_offer() -> str:
    async def offer() -> str:
        connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        connection.addTransceiver("video", "sendonly")
        connection.addTransceiver("audio", "sendonly")
        connection.createDataChannel("text")
        sdp = (await connection.createOffer()).sdp
        await connection.close()
        return str(sdp)

    return asyncio.run(offer())


OFFER = make_offer()
LINES = OFFER.splitlines(keepends=True)
CANDIDATE = "a=candidate:1 1 udp 1 127.0.0.1 9 typ host\r\n"
places = st.integers(0, len(LINES) - 1)


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """The offer with some lines left out, doubled, swapped or altered."""
    lines = list(LINES)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(places)
        if at >= len(lines):
            continue
        match draw(st.integers(0, 3)):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, lines[at])
            case 2:
                lines[at] = lines[at][: draw(st.integers(0, len(lines[at])))] + "\r\n"
            case _:
                spot = draw(st.integers(0, len(lines[at]) - 1))
                lines[at] = lines[at][:spot] + draw(st.text(max_size=4)) + lines[at][spot + 1 :]
    return "".join(lines)


async def _answer(offer: str, unheard: list[dict[str, object]]) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unheard.append(context))
    ended: list[Session] = []
    session = Session("cam", WebRtcSettings(), ("127.0.0.1",), SystemClock(), Ledger(), ended.append)
    try:
        await session.answer(offer)
    except (BadOffer, UnusableOffer) as refused:
        assert str(refused) and "\n" not in str(refused)
    finally:
        await session.aclose()
        assert ended == [session]


def test_a_damaged_offer_is_answered_or_refused() -> None:
    unheard: list[dict[str, object]] = []

    @settings(max_examples=150)
    @given(damaged())
    def check(offer: str) -> None:
        asyncio.run(_answer(offer, unheard))

    check()
    # What fails in tasks of their own is told when they are forgotten.
    gc.collect()
    assert not unheard


@given(st.text(max_size=200) | st.lists(st.sampled_from(LINES)).map("".join))
def test_other_text_is_refused_as_an_offer_and_as_a_fragment(text: str) -> None:
    for read in (check_offer, read_fragment):
        _only_refuses(read, text)


def _only_refuses(read: Callable[[str], object], text: str) -> None:
    try:
        read(text)
    except (BadOffer, UnusableOffer) as refused:
        assert "\n" not in str(refused)


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        (OFFER + OFFER[OFFER.index("m=audio") : OFFER.index("m=application")], UnusableOffer, "more than one audio"),
        (OFFER.replace("a=group:BUNDLE 0 1 2", "a=group:BUNDLE 0 1"), UnusableOffer, "max-bundle"),
        (OFFER.replace("m=video", "m=image"), UnusableOffer, "'image' are not understood"),
        (OFFER.replace("a=sendonly", "a=inactive"), UnusableOffer, "no track is sent"),
        (OFFER[: OFFER.index("m=")], BadOffer, "no media"),
        (
            OFFER + "a=candidate:1 1 udp 1 127.0.0.1 9 typ host\r\n" * (CANDIDATES_LIMIT + 1),
            UnusableOffer,
            "candidates",
        ),
    ],
)
def test_what_cannot_be_taken_is_named(changed: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        check_offer(changed)


def test_what_is_offered() -> None:
    offered = check_offer(OFFER.replace("a=sendonly", "a=recvonly", 1))
    assert not offered.video and offered.audio and all(offered.ice)


def test_names_are_not_looked_up() -> None:
    named = "a=candidate:1 1 udp 1 f3b0.local 9 typ host\r\n"
    kept = "a=candidate:2 1 udp 1 127.0.0.1 9 typ host\r\n"
    assert without_names(OFFER + named + kept) == OFFER + kept
    fragment = read_fragment("a=ice-ufrag:u\r\na=ice-pwd:p\r\n" + named + kept + "a=end-of-candidates\r\n")
    assert [candidate.ip for candidate in fragment.candidates] == ["127.0.0.1"]
    assert fragment.ice == ("u", "p") and fragment.complete
