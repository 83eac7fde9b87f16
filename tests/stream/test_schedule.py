"""Hours of the week."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from stream.schedule import Hours, is_on


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1_000_000_000


NIGHT = Hours.model_validate({"days": ["fri"], "start": "22:00", "end": "06:00"})
OFFICE = Hours.model_validate({"days": ["mon", "tue"], "start": "09:00", "end": "17:00", "timezone": "Europe/Berlin"})


@pytest.mark.parametrize(
    ("when", "on"),
    [
        # 2026-11-20 is a Friday.
        ("2026-11-20T21:59:59", False),
        ("2026-11-20T22:00:00", True),
        ("2026-11-21T05:59:59", True),
        ("2026-11-21T06:00:00", False),
        ("2026-11-21T22:30:00", False),
    ],
)
def test_a_night_goes_on_into_the_next_day(when: str, on: bool) -> None:
    assert is_on([NIGHT], at(when)) is on


@pytest.mark.parametrize(
    ("when", "on"),
    [
        ("2026-11-23T07:59:59", False),
        ("2026-11-23T08:00:00", True),
        ("2026-11-23T16:00:00", False),
        # In summer Berlin is two hours ahead.
        ("2026-07-20T07:00:00", True),
        ("2026-07-22T10:00:00", False),
    ],
)
def test_hours_are_those_of_a_place(when: str, on: bool) -> None:
    assert is_on([OFFICE], at(when)) is on


def test_whole_days_and_none() -> None:
    assert is_on([], at("2026-11-20T12:00:00"))
    sunday = Hours.model_validate({"days": ["sun"]})
    assert is_on([sunday], at("2026-11-22T00:00:00")) and is_on([sunday], at("2026-11-22T23:59:59"))
    assert not is_on([sunday], at("2026-11-23T00:00:00"))


@pytest.mark.parametrize("hours", [{"days": []}, {"days": ["noday"]}, {"start": "25:00"}, {"timezone": "Mars/Base"}])
def test_what_is_no_schedule(hours: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Hours.model_validate(hours)
