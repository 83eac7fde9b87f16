"""When a source is watched: hours of the week in its own time zone."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, time, timedelta
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def _known_zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"time zone {name!r} is not known; give one like Europe/Berlin") from None
    return name


def _clock_text(value: object) -> object:
    # To YAML, 18:00 without quotes is the number 1080, which would be taken for seconds.
    if isinstance(value, int | float):
        raise ValueError('a time of day is text; write it in quotes, "18:00"')
    return value


TimeOfDay = Annotated[time, BeforeValidator(_clock_text)]


class Hours(BaseModel):
    """Some hours of some days; those that end before they begin go on into the next day."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    days: Annotated[tuple[Day, ...], Field(min_length=1)] = DAYS
    """Days on which they begin."""
    start: TimeOfDay = time(0, 0)
    """When they begin."""
    end: TimeOfDay = time(0, 0)
    """When they end; 00:00 is midnight after."""
    timezone: Annotated[str, AfterValidator(_known_zone)] = "UTC"
    """Whose clock that is."""

    def covers(self, when: datetime) -> bool:
        """Whether an instant (with a time zone) lies in them."""
        local = when.astimezone(ZoneInfo(self.timezone))
        now, today = local.time(), DAYS[local.weekday()]
        if self.start < self.end:
            return today in self.days and self.start <= now < self.end
        yesterday = DAYS[(local.weekday() - 1) % 7]
        return (today in self.days and now >= self.start) or (yesterday in self.days and now < self.end)


def is_on(schedule: Sequence[Hours], wall_ns: int) -> bool:
    """Whether a source is watched at a time (UTC in ns since 1970). Without a schedule it always is."""
    when = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=wall_ns // 1000)
    return not schedule or any(hours.covers(when) for hours in schedule)
