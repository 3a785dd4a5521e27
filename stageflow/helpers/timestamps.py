"""Reads and writes points in time: ISO 8601, RFC 2822, unix numbers and the dates people type.

Pure functions over text; only `now_utc` and `iso_timestamp` read the clock, and both take one as an argument.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from decimal import Decimal, InvalidOperation
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Final

from stageflow.core.errors import DefinitionError

__all__ = [
    "TimestampParseError",
    "UnixPrecision",
    "detect_unix_precision",
    "format_iso8601",
    "from_unix",
    "iso_timestamp",
    "normalize_to_utc",
    "now_utc",
    "parse_timestamp",
]

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class TimestampParseError(DefinitionError, ValueError):
    """The text names no point in time this module can read. Field `text` holds it."""

    code = "SF-TIMESTAMP"


class UnixPrecision(StrEnum):
    """What one unit of a unix number means."""

    SECONDS = "seconds"
    MILLISECONDS = "milliseconds"
    MICROSECONDS = "microseconds"
    NANOSECONDS = "nanoseconds"


MICROS_PER_UNIT: Final = {
    UnixPrecision.SECONDS: Decimal(1_000_000),
    UnixPrecision.MILLISECONDS: Decimal(1_000),
    UnixPrecision.MICROSECONDS: Decimal(1),
    UnixPrecision.NANOSECONDS: Decimal("0.001"),
}


def now_utc() -> datetime:
    """The present moment, aware, in UTC."""
    return datetime.now(UTC)


def format_iso8601(moment: datetime) -> str:
    """Write `moment` in UTC with exactly six fractional digits and `+00:00`; a naive one is taken as UTC."""
    return normalize_to_utc(moment, UTC).isoformat(timespec="microseconds")


def iso_timestamp(clock: Callable[[], datetime] = now_utc) -> str:
    """The present moment as `format_iso8601` writes it."""
    return format_iso8601(clock())


def normalize_to_utc(moment: datetime, default_tz: tzinfo | None = None) -> datetime:
    """Convert to UTC; a naive moment gets `default_tz` first, and stays as it is when there is none."""
    if moment.tzinfo is None:
        if default_tz is None:
            return moment
        moment = moment.replace(tzinfo=default_tz)
    return moment.astimezone(UTC)


def detect_unix_precision(text: str) -> UnixPrecision:
    """Guess the unit from the digits before the point: up to 10 seconds, 11-13 milliseconds, 14-16 microseconds.

    Raises:
        TimestampParseError: more digits. Nanoseconds are never guessed: `from_unix` takes them by name.
    """
    digits = len(text.strip().lstrip("+-").partition(".")[0])
    if digits <= 10:
        return UnixPrecision.SECONDS
    if digits <= 13:
        return UnixPrecision.MILLISECONDS
    if digits <= 16:
        return UnixPrecision.MICROSECONDS
    raise TimestampParseError(
        f"{text!r} has {digits} digits, more than unix microseconds have",
        hint="nanoseconds are read by from_unix(value, UnixPrecision.NANOSECONDS)",
        text=text,
    )


def from_unix(value: str | float | Decimal, precision: UnixPrecision = UnixPrecision.SECONDS) -> datetime:
    """The moment `value` units after (or, negative, before) 1970 in UTC, exact to the microsecond, rounded down.

    Raises:
        TimestampParseError: not a finite number, or outside the years 1 to 9999.
    """
    try:
        # str() first: the decimal a float prints is what its author meant, its binary expansion is not.
        number = Decimal(value.strip() if isinstance(value, str) else str(value))
        micros = (number * MICROS_PER_UNIT[precision]).to_integral_value("ROUND_FLOOR")
        return EPOCH + timedelta(microseconds=int(micros))
    except (InvalidOperation, OverflowError, ValueError) as error:
        raise TimestampParseError(f"{value!r} is no unix time in {precision}", text=str(value)) from error


NUMBER: Final = re.compile(r"[+-]?\d+(?:\.\d+)?", re.ASCII)
ZONE: Final = r"(?P<zone>[Zz]|UTC|GMT|[+-]\d{2}:?\d{2}|[+-]\d{2})"
CLOCK: Final = r"(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?:[.,](?P<fraction>\d{1,9})\d*)?)?"
TIME: Final = rf"(?:(?:[Tt]|,?\s+)(?:at\s+)?{CLOCK}(?:\s*(?P<half>[AaPp])\.?[Mm]\.?)?(?:\s*{ZONE})?)?"
YEAR: Final = r"(?P<year>\d{4})"
NAMED: Final = r"(?P<name>[A-Za-z]{3,9})\.?"
DAY: Final = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"

DATE_FORMS: Final = tuple(
    re.compile(date + TIME, re.ASCII)
    for date in (
        rf"{YEAR}-(?P<month>\d{{2}})-(?P<day>\d{{2}})",
        rf"{YEAR}/(?P<month>\d{{1,2}})/(?P<day>\d{{1,2}})",
        rf"(?P<first>\d{{1,2}})/(?P<other>\d{{1,2}})/{YEAR}",
        rf"{NAMED}\s+{DAY},?\s+{YEAR}",
        rf"{DAY}\s+{NAMED},?\s+{YEAR}",
    )
)
RFC_2822: Final = re.compile(
    r"(?:(?P<weekday>[A-Za-z]{3}),\s*)?\d{1,2}\s+[A-Za-z]{3}\s+\d{4}\s+\d{2}:\d{2}(?::\d{2})?\s+(?:[+-]\d{4}|[A-Za-z]{1,3})",
    re.ASCII,
)
MONTHS: Final = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
WEEKDAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def parse_timestamp(text: str) -> datetime:
    """Read one moment from text and return it aware, in UTC.

    Tried in this order: unix numbers (with a fraction: seconds; else the unit follows from the digits), ISO 8601 (a
    missing zone is UTC, a missing time midnight), RFC 2822, then `October 5, 2023`, `5 Oct 2023`, `10/05/2023` (month
    first where both readings exist) and `2023/10/05`, each with or without a time, AM/PM and a zone.

    Raises:
        TimestampParseError: empty, unreadable, or a date that does not exist.
    """
    stripped = text.strip()
    if not stripped:
        raise TimestampParseError("an empty text is no timestamp", text=text)
    if NUMBER.fullmatch(stripped):
        fractional = "." in stripped
        return from_unix(stripped, UnixPrecision.SECONDS if fractional else detect_unix_precision(stripped))
    if (rfc := RFC_2822.fullmatch(stripped)) is not None:
        return _from_rfc_2822(stripped, rfc["weekday"])
    for form in DATE_FORMS:
        found = form.fullmatch(stripped)
        if found is not None:
            try:
                return _from_fields(found.groupdict())
            except (ValueError, OverflowError) as error:
                raise TimestampParseError(f"{text!r} names no existing moment: {error}", text=text) from error
    raise TimestampParseError(
        f"{text!r} is in no known date format",
        hint="use ISO 8601, for example 2023-10-05T14:30:00+00:00",
        text=text,
    )


def _from_rfc_2822(text: str, weekday: str | None) -> datetime:
    """Read an e-mail date; the weekday, where given, must be the right one, or the text is corrupt."""
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError) as error:
        raise TimestampParseError(f"{text!r} is no RFC 2822 date", text=text) from error
    if weekday is not None and WEEKDAYS[moment.weekday()] != weekday.lower():
        raise TimestampParseError(f"{text!r}: that day is no {weekday}", text=text)
    return normalize_to_utc(moment, UTC)


def _from_fields(fields: dict[str, str | None]) -> datetime:
    """Build the moment from the named groups of a date form; ValueError where the calendar has no such moment."""
    year = int(fields["year"] or 0)
    if fields.get("first") is not None:
        first, other = int(fields["first"] or 0), int(fields["other"] or 0)
        month, day = (other, first) if first > 12 else (first, other)
    else:
        name = fields.get("name")
        month = _month_number(name) if name is not None else int(fields["month"] or 0)
        day = int(fields["day"] or 0)
    hour = int(fields["hour"] or 0)
    half = fields["half"]
    if half is not None:
        if not 1 <= hour <= 12:
            raise ValueError(f"hour {hour} with AM/PM")
        hour = hour % 12 + (12 if half in "pP" else 0)
    micros = int((fields["fraction"] or "0").ljust(9, "0")) // 1000
    zone = _zone(fields["zone"])
    moment = datetime(year, month, day, hour, int(fields["minute"] or 0), int(fields["second"] or 0), micros, zone)
    return moment.astimezone(UTC)


def _month_number(name: str) -> int:
    """1 to 12 for an English month name or its three-letter form (`Sept` too)."""
    low = name.lower()
    for number, month in enumerate(MONTHS, start=1):
        if low in {month, month[:3]} or (month == "september" and low == "sept"):
            return number
    raise ValueError(f"{name!r} is no month")


def _zone(text: str | None) -> tzinfo:
    """The zone of a numeric offset, with or without colon and minutes; none given means UTC."""
    if text is None or text.upper() in {"Z", "UTC", "GMT"}:
        return UTC
    digits = text[1:].replace(":", "").ljust(4, "0")
    hours, minutes = int(digits[:2]), int(digits[2:])
    if minutes > 59:
        raise ValueError(f"offset {text}")
    offset = timedelta(hours=hours, minutes=minutes)
    return timezone(-offset if text[0] == "-" else offset)
