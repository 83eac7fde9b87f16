"""An ``Event`` as the flat fields of a stream entry: CloudEvents 1.0 attributes, and the payload as JSON text."""

from __future__ import annotations

import json
from typing import Final

from stream.errors import EventRejected
from stream.types import Event

DATASCHEMA: Final = "urn:sightwire:event:v1"
"""Id of the JSON Schema in ``stream/schema``."""
FIELDS: Final = (
    "specversion",
    "id",
    "source",
    "type",
    "time",
    "subject",
    "datacontenttype",
    "dataschema",
    "data",
)
"""Every entry has these fields, in this order."""


def event_fields(event: Event) -> tuple[str, ...]:
    """Values of ``FIELDS``. Raises ``EventRejected`` when the payload is not plain JSON values."""
    return (
        "1.0",
        event.id,
        event.source,
        event.type,
        event.time,
        event.subject,
        "application/json",
        DATASCHEMA,
        payload_json(event),
    )


def payload_json(event: Event) -> str:
    """The payload as compact JSON. Raises ``EventRejected`` when it is not plain JSON values (NaN is not)."""
    try:
        return json.dumps(event.data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise EventRejected(f"event {event.id} of {event.source} is not JSON: {error}") from None
