"""Events as a consumer gets them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stream.masks import ENCODING, decode_mask

KINDS = ("action", "class", "segmentation", "source")
"""Every kind of event; each has its stream."""


@dataclass(frozen=True, slots=True, eq=False)
class ReceivedEvent:
    """One event from a stream."""

    id: str
    """Idempotency key: an event that comes twice has the same."""
    type: str
    """``io.sightwire.{kind}.{phase}.v1``."""
    source: str
    """``/sources/{id}``."""
    time: str
    """Capture time, RFC 3339 UTC with microseconds."""
    subject: str
    """The label."""
    data: dict[str, Any]
    """The payload that the JSON Schema describes."""
    stream: str
    """Stream it was read from."""
    entry_id: str
    """Its id there, ``{ms}-{n}``; ms is when the server appended it."""
    deliveries: int = 1
    """How often this group has been given it, this time included."""

    @property
    def kind(self) -> str:
        """action, class, segmentation or source."""
        return self.type.split(".")[2]

    @property
    def phase(self) -> str:
        """start, update or end."""
        return self.type.split(".")[3]

    @property
    def source_id(self) -> str:
        """The source's id."""
        return self.source.removeprefix("/sources/")

    @property
    def appended_ms(self) -> int:
        """When the server appended it, ms since 1970 UTC."""
        return int(self.entry_id.partition("-")[0])

    def mask(self) -> NDArray[np.uint8] | None:
        """Class indices uint8 ``[h, w]``; ``None`` when there is no mask. Raises ``ValueError`` for a damaged one."""
        found = self.data.get("mask")
        if not isinstance(found, dict):
            return None
        if found.get("encoding") != ENCODING:
            raise ValueError(f"mask encoding {found.get('encoding')!r} is not known; update sightwire")
        height, width = found["size"]
        return decode_mask(found["data"], (height, width))


def parse_entry(stream: str, entry_id: str, fields: Mapping[str, str], deliveries: int = 1) -> ReceivedEvent:
    """An entry's fields as an event. Raises ``ValueError`` when they are not one."""
    try:
        data = json.loads(fields["data"])
        event = ReceivedEvent(
            id=fields["id"],
            type=fields["type"],
            source=fields["source"],
            time=fields["time"],
            subject=fields["subject"],
            data=data,
            stream=stream,
            entry_id=entry_id,
            deliveries=deliveries,
        )
    except KeyError as error:
        raise ValueError(f"entry {entry_id} of {stream} has no field {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"entry {entry_id} of {stream}: data is not JSON: {error}") from None
    if not isinstance(data, dict) or event.type.count(".") < 4:
        raise ValueError(f"entry {entry_id} of {stream} is not a Sightwire event")
    return event
