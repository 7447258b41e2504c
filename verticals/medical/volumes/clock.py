"""Dates and times of DICOM as one clock: that of the place where the images were taken.

Dates (DA) and times (TM) are local, as Timezone Offset From UTC (0008,0201) says where it is there;
a date-time (DT) is local too, unless it carries an offset of its own (PS3.5 6.2, PS3.3 C.12.1.1.8).
What says no minute is no time to count from.
"""

from __future__ import annotations

import datetime
import re

_DATE = r"(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)"
_TIME = r"(?P<hour>\d\d)(?P<minute>\d\d)((?P<second>\d\d)(\.(?P<part>\d{1,6}))?)?"
_OFFSET = r"(?P<sign>[+-])(?P<hours>\d\d)(?P<minutes>\d\d)"
DATE = re.compile(_DATE, re.ASCII)
TIME = re.compile(_TIME, re.ASCII)
OFFSET = re.compile(_OFFSET, re.ASCII)
MOMENT = re.compile(f"{_DATE}{_TIME}(?P<offset>{_OFFSET})?", re.ASCII)
DAY = datetime.timedelta(days=1)
SECOND = datetime.timedelta(seconds=1)
WEST, EAST = datetime.timedelta(hours=-12), datetime.timedelta(hours=14)
"""Offsets from UTC that there are (PS3.5 table 6.2-1)."""


def date(text: str) -> datetime.date:
    """A date (DA).

    Raises:
        ValueError: it is none.
    """
    found = _matched(DATE, text)
    return _date(found)


def time_of_day(text: str) -> datetime.time:
    """A time of day (TM) of at least hours and minutes.

    Raises:
        ValueError: it is none, or says no minute.
    """
    return _time(_matched(TIME, text))


def offset(text: str) -> datetime.timedelta:
    """An offset from UTC, ``+0100``.

    Raises:
        ValueError: it is none.
    """
    return _offset(_matched(OFFSET, text))


def local_moment(
    text: str, zone: datetime.timedelta | None, time: datetime.time | None = None
) -> datetime.datetime:
    """A date-time (DT), as the clock shows it that the other dates and times were read from.

    Args:
        text: with an offset from UTC or without.
        zone: of the other times; ``None`` where it is not said.
        time: the same moment, as a local time of day where it is known.

    Raises:
        ValueError: it is no date-time, says no minute, or has an offset and nothing says which
            offset the other times have.
    """
    found = _matched(MOMENT, text)
    moment = datetime.datetime.combine(_date(found), _time(found))
    if found["offset"] is None:
        return moment
    own = _offset(found)
    if zone is not None:
        return moment + (zone - own)
    if time is not None and same_time_of_day(moment, time):
        return moment
    raise ValueError(
        f"it has an offset from UTC ({found['offset']}), and no Timezone Offset From UTC "
        "(0008,0201) says which offset the other times have"
    )


def same_time_of_day(moment: datetime.datetime, time: datetime.time) -> bool:
    """Whether they differ by a second at most, on whatever day."""
    apart = abs(datetime.datetime.combine(moment.date(), time) - moment)
    return min(apart, DAY - apart) <= SECOND


def _matched(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    found = pattern.fullmatch(text.strip(" \0"))
    if found is None:
        raise ValueError("it is no date or time, or does not say the minute")
    return found


def _date(found: re.Match[str]) -> datetime.date:
    try:
        return datetime.date(int(found["year"]), int(found["month"]), int(found["day"]))
    except ValueError:
        raise ValueError("it is no date of the calendar") from None


def _time(found: re.Match[str]) -> datetime.time:
    """A leap second, 60, is the 59th, as :mod:`datetime` knows none."""
    second = 59 if found["second"] == "60" else int(found["second"] or 0)
    part = int((found["part"] or "0").ljust(6, "0"))
    try:
        return datetime.time(int(found["hour"]), int(found["minute"]), second, part)
    except ValueError:
        raise ValueError("it is no time of day") from None


def _offset(found: re.Match[str]) -> datetime.timedelta:
    hours, minutes = int(found["hours"]), int(found["minutes"])
    size = datetime.timedelta(hours=hours, minutes=minutes)
    signed = -size if found["sign"] == "-" else size
    if minutes > 59 or not WEST <= signed <= EAST:
        raise ValueError("it is no offset from UTC")
    return signed
