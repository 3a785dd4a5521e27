"""Every form of time a user may hand in, and the ones that must be refused."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stageflow.core.errors import DefinitionError
from stageflow.helpers.timestamps import (
    TimestampParseError,
    UnixPrecision,
    detect_unix_precision,
    format_iso8601,
    from_unix,
    iso_timestamp,
    normalize_to_utc,
    now_utc,
    parse_timestamp,
)

NOON = datetime(2023, 10, 5, 14, 30, 15, tzinfo=UTC)
MIDNIGHT = datetime(2023, 10, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1696516215", NOON),
        ("1696516215000", NOON),
        ("1696516215000000", NOON),
        (" 1696516215.5 ", NOON + timedelta(milliseconds=500)),
        ("-1.5", datetime(1969, 12, 31, 23, 59, 58, 500000, tzinfo=UTC)),
        ("-1500000000123", datetime(1922, 6, 20, 21, 19, 59, 877000, tzinfo=UTC)),
        ("-1000000000000001", datetime(1938, 4, 24, 22, 13, 19, 999999, tzinfo=UTC)),
        ("0", datetime(1970, 1, 1, tzinfo=UTC)),
        ("2023-10-05T14:30:15Z", NOON),
        ("2023-10-05t14:30:15z", NOON),
        ("2023-10-05 14:30:15", NOON),
        ("2023-10-05T14:30:15.123456789+00:00", NOON + timedelta(microseconds=123456)),
        ("2023-10-05T16:30:15+02:00", NOON),
        ("2023-10-05T16:30:15+0200", NOON),
        ("2023-10-05T16:30:15+02", NOON),
        ("2023-10-05 09:00:15 -05:30", NOON),
        ("2023-10-05", MIDNIGHT),
        ("Thu, 05 Oct 2023 14:30:15 GMT", NOON),
        ("Thu, 5 Oct 2023 16:30:15 +0200", NOON),
        ("5 Oct 2023 14:30:15 -0000", NOON),
        ("October 5, 2023", MIDNIGHT),
        ("Oct 5, 2023", MIDNIGHT),
        ("Sept. 5 2023", datetime(2023, 9, 5, tzinfo=UTC)),
        ("5 October 2023", MIDNIGHT),
        ("October 5th, 2023 at 2:30:15 pm", NOON),
        ("10/05/2023", MIDNIGHT),
        ("13/05/2023", datetime(2023, 5, 13, tzinfo=UTC)),
        ("10/05/2023 14:30:15", NOON),
        ("2023/10/05", MIDNIGHT),
        ("2023/10/05 2:30:15 PM", NOON),
        ("2023/10/05 12:00 AM", MIDNIGHT),
    ],
)
def test_readable(text: str, expected: datetime) -> None:
    read = parse_timestamp(text)
    assert read == expected
    assert read.tzinfo is UTC


@pytest.mark.parametrize(
    "text",
    ["", "   ", "nan", "inf", "-inf", "1e9", "hello", "Zulu", "2023-13-05", "2023-02-30", "2023-10-05T25:00:00Z",
     "2023-10-05T14:30:15+99:00", "2023-10-05T14:30:15+02:75", "2023-10-05X14:30:15", "32/32/2023", "Foo 5, 2023",
     "2023/10/05 14:30 PM", "Mon, 05 Oct 2023 14:30:15 GMT", "16965162150000000", "99999999999.0" * 3, "٢٠٢٣"],
)  # fmt: skip
def test_refused(text: str) -> None:
    with pytest.raises(TimestampParseError) as caught:
        parse_timestamp(text)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, DefinitionError)
    assert pickle.loads(pickle.dumps(caught.value)).text == text


def test_precision_goes_by_digits() -> None:
    assert detect_unix_precision("1" * 10) is UnixPrecision.SECONDS
    assert detect_unix_precision("-" + "1" * 11) is UnixPrecision.MILLISECONDS
    assert detect_unix_precision("1" * 13 + ".5") is UnixPrecision.MILLISECONDS
    assert detect_unix_precision("1" * 14) is UnixPrecision.MICROSECONDS
    with pytest.raises(TimestampParseError, match="from_unix"):
        detect_unix_precision("1" * 19)


def test_nanoseconds_are_read_when_named() -> None:
    assert from_unix("1696516215123456789", UnixPrecision.NANOSECONDS) == NOON + timedelta(microseconds=123456)
    assert from_unix(0.1) == datetime(1970, 1, 1, 0, 0, 0, 100000, tzinfo=UTC)
    with pytest.raises(TimestampParseError):
        from_unix(float("nan"))
    with pytest.raises(TimestampParseError):
        from_unix(1e300)


def test_written_form_has_six_digits_and_an_offset() -> None:
    assert iso_timestamp(lambda: NOON) == "2023-10-05T14:30:15.000000+00:00"
    assert format_iso8601(datetime(2023, 10, 5, 16, 30, 15, tzinfo=timezone(timedelta(hours=2)))) == iso_timestamp(
        lambda: NOON
    )
    assert format_iso8601(NOON.replace(tzinfo=None)) == iso_timestamp(lambda: NOON)
    assert now_utc().tzinfo is UTC


def test_naive_moments_get_the_default_zone_or_stay_naive() -> None:
    naive = datetime(2023, 10, 5, 16, 30, 15)
    assert normalize_to_utc(naive) is naive
    assert normalize_to_utc(naive, timezone(timedelta(hours=2))) == NOON
    assert normalize_to_utc(NOON, timezone(timedelta(hours=2))) == NOON


@settings(deadline=None)  # a loaded machine is no failure
@given(st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=-7)), timezone(timedelta(minutes=345))])))
def test_what_is_written_is_read_back(moment: datetime) -> None:
    try:
        written = format_iso8601(moment)
    except OverflowError:
        return  # beyond year 1 or 9999 once converted
    assert parse_timestamp(written) == moment


@settings(deadline=None)  # a loaded machine is no failure
@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_by_name(text: str) -> None:
    try:
        read = parse_timestamp(text)
    except TimestampParseError as error:
        said = error.fields["text"]
    else:
        said = text if read.tzinfo is UTC else None
    assert said == text


@settings(deadline=None)  # a loaded machine is no failure
@given(st.decimals(min_value=-(10**10), max_value=10**10, places=6, allow_nan=False))
def test_fractional_seconds_are_exact(value: object) -> None:
    read = from_unix(str(value))
    micros = (read - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    assert micros == int(str(value).replace(".", ""))
