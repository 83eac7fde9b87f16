"""Settings of one source, and what can be read off its address."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from stream.schedule import Hours

NETWORK_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "http", "https", "udp")
"""Schemes of addresses that name a host; ``udp`` names where to listen."""
SCHEMES = (*NETWORK_SCHEMES, "webrtc", "v4l2", "file", "synthetic", "replay")
"""Kinds of source this version opens."""
API_SCHEMES = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "http", "https", "webrtc", "synthetic")
"""Those that a source may have that comes through the API: nothing that is on this machine."""

SourceId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
Seconds = Annotated[float, Field(gt=0, le=3600)]
MAX_PIXELS = 36_000_000
"""8K, upright or not, of television (7680 x 4320) and of cinema (8192 x 4320)."""


class Transport(StrEnum):
    """How RTP travels for an RTSP source."""

    TCP = "tcp"
    UDP = "udp"
    AUTO = "auto"
    """TCP; UDP where that cannot be set up or stays silent."""


class Decode(StrEnum):
    """What decodes video."""

    AUTO = "auto"
    """Hardware where there is some that can, else software."""
    SOFTWARE = "software"
    CUDA = "cuda"
    """NVIDIA, by FFmpeg."""
    VAAPI = "vaapi"
    """Intel and AMD on Linux, by FFmpeg."""
    NVDEC = "nvdec"
    """NVIDIA, by PyNvVideoCodec."""


class Scaling(StrEnum):
    """How pictures are scaled to the size that a pack takes."""

    FAST = "fast"
    """Bilinear at the least cost; fine detail may shimmer."""
    AREA = "area"
    """Mean of the pixels that one pixel stands for: smoother, and slower."""


class CaptionService(StrEnum):
    """Which of the four services of closed captions (EIA-608) is read; a second language often is CC3."""

    CC1 = "cc1"
    CC2 = "cc2"
    CC3 = "cc3"
    CC4 = "cc4"

    @property
    def number(self) -> int:
        """1 to 4."""
        return int(self.value[2:])


class Pace(StrEnum):
    """How a file is read."""

    REALTIME = "realtime"
    """In its own time, like a camera; stale windows may be dropped."""
    FAST = "fast"
    """As fast as everything downstream takes it; nothing is dropped."""


class Section(BaseModel):
    """A part of the settings: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Share = Annotated[float, Field(ge=0, le=1)]
Region = Annotated[tuple[tuple[Share, Share], ...], Field(min_length=3, max_length=256)]
"""A polygon: corners ``[x, y]`` in shares of width and height, from the top left."""


class SourceSettings(Section):
    """One camera, stream or file."""

    id: SourceId
    url: SecretStr
    """Where it is; secret because it may hold a password."""
    transport: Transport = Transport.TCP
    pace: Pace = Pace.REALTIME
    loop: bool = False
    """Start a file again when it ends."""
    packs: tuple[str, ...] | None = None
    """Packs that watch it; all when not given."""
    audio: bool = True
    """Whether to decode audio."""
    open_timeout_s: Seconds = 5.0
    decode: Decode = Decode.SOFTWARE
    skip_frames: bool = True
    """Whether to leave undecoded what no pack needs: all but key frames, or what no other frame refers to."""
    scaling: Scaling = Scaling.FAST
    captions: CaptionService = CaptionService.CC1
    """Closed captions inside pictures that become texts, where there is no text track: cc1 to cc4."""
    max_pixels: Annotated[int, Field(ge=65_536, le=2**31 - 1)] = MAX_PIXELS
    """Largest picture that is decoded, width times height: decoders keep up to 17 of them in memory."""
    read_timeout_s: Seconds = 1.0
    """How long a read of RTP over UDP, or of a device, may wait before the stop flag is looked at again."""
    stall_timeout_s: Seconds = 5.0
    """A live source that delivers nothing for this long is lost."""
    verify_tls: bool = True
    """Whether a server over TLS must have a certificate that this machine trusts; cameras often sign their own."""
    hop_s: Annotated[float, Field(gt=0, le=120)] | None = None
    """Hop of the main (first) branch of every pack that watches it, instead of the pack's."""
    roi: tuple[Region, ...] = ()
    """Regions of interest: packs see nothing else. All when not given."""
    privacy: tuple[Region, ...] = ()
    """Regions that are blackened as soon as a picture is decoded: nothing ever sees them."""
    schedule: tuple[Hours, ...] = ()
    """When it is watched; always when not given."""
    trusted: bool = True
    """Whether the operator named it, who may name any host and file. What comes through the API never is."""
    publish_token: SecretStr | None = None
    """Bearer token for publishing to a ``webrtc:`` source, beside the service's own."""
    record: Path | None = None
    """File to record it to while it is watched, to be replayed by ``sightwire replay``."""
    record_max_mb: Annotated[int, Field(ge=8)] = 4096
    """Size of all files of the recording together; the oldest make room."""

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: SecretStr) -> SecretStr:
        scheme = source_scheme(url.get_secret_value())
        if scheme not in SCHEMES:
            raise ValueError(f"scheme {scheme!r} is not supported; use one of {', '.join(SCHEMES)} or a file path")
        if scheme == "webrtc" and not is_publishing(url.get_secret_value()):
            raise ValueError("webrtc:// takes no address: publishers come to this service")
        if scheme in NETWORK_SCHEMES and has_loose_password(url.get_secret_value()):
            raise ValueError("the password must be percent-encoded (/ is %2F, # is %23, ? is %3F, @ is %40)")
        return url

    @model_validator(mode="after")
    def _scheme_for_its_origin(self) -> Self:
        if not self.trusted and self.scheme not in API_SCHEMES:
            raise ValueError(f"scheme {self.scheme!r} is for the configuration file only, not for the API")
        if not self.trusted and self.max_pixels > MAX_PIXELS:
            raise ValueError(f"max_pixels: only the configuration file may set more than {MAX_PIXELS}")
        return self

    @model_validator(mode="after")
    def _may_be_published(self) -> Self:
        if self.publish_token is not None and self.scheme != "webrtc":
            raise ValueError("publish_token: only sources with url webrtc: are published to")
        return self

    @model_validator(mode="after")
    def _replayed_once(self) -> Self:
        if self.scheme == "replay" and self.loop:
            raise ValueError("loop: a recording is lived through once; leave it out")
        return self

    @model_validator(mode="after")
    def _may_be_recorded(self) -> Self:
        if self.record is None:
            return self
        if not self.trusted:
            raise ValueError("record: only the configuration file may name a file to write")
        if self.scheme in ("file", "synthetic", "replay", "webrtc"):
            raise ValueError(f"record: a {self.scheme} source is not recorded; record cameras and streams")
        if self.privacy:
            raise ValueError("record: packets are kept as they come, without the privacy masks; leave out one of both")
        return self

    @property
    def scheme(self) -> str:
        """One of ``SCHEMES``."""
        return source_scheme(self.url.get_secret_value())

    @property
    def live(self) -> bool:
        """Whether media comes in its own time, so that freshness beats completeness."""
        return self.endless or self.pace is Pace.REALTIME

    @property
    def endless(self) -> bool:
        """Whether it has no end of its own: a camera or a stream, not something that is read or made."""
        return self.scheme not in ("file", "synthetic", "replay")


def is_publishing(url: str) -> bool:
    """Whether the address stands for whoever publishes to the source over WebRTC: it names no host."""
    return url.lower() in ("webrtc:", "webrtc://")


def source_scheme(url: str) -> str:
    """Scheme of a source URL; a plain path is ``file``."""
    if is_publishing(url):
        return "webrtc"
    head, colon, _ = url.partition("://")
    return head.lower() if colon else "file"


def redacted_url(url: str) -> str:
    """The URL without its user info and query, fit for a message."""
    scheme = source_scheme(url)
    if scheme == "file":
        return url
    if scheme == "webrtc":
        return "webrtc://"
    # By hand: an unescaped /, # or ? in a password would leave a part of it in what urlsplit takes for the path.
    rest = url.partition("://")[2].rpartition("@")[2]
    return f"{scheme}://{rest.partition('?')[0].partition('#')[0]}"


def has_loose_password(url: str) -> bool:
    """Whether the user info holds a character that ends it too early, so that the address means another host."""
    rest = url.partition("://")[2]
    user_info = rest.rpartition("@")[0]
    return any(char in user_info for char in "/?#")
