"""Log records: where they come from is on every line, and records of workers come out as they went in."""

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stageflow.context import tracing
from stageflow.events.event import Event
from stageflow.observability.logs import JsonFormatter, LogSink, TextFormatter, TraceFilter, install


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    made = logging.getLogger("test.logs")
    made.propagate = False
    yield made
    made.handlers.clear()
    made.setLevel(logging.NOTSET)


@pytest.fixture
def written(logger: logging.Logger) -> Callable[..., io.StringIO]:
    def make(**options: Any) -> io.StringIO:
        stream = io.StringIO()
        install(logging.DEBUG, stream=stream, logger="test.logs", **options)
        return stream

    return make


EXTRA = {"run_id": "0123456789abcdef", "stage": "parse", "item": (4, 2), "attempt": 2, "lane": "process"}


def test_text_says_run_stage_item_and_attempt(logger: logging.Logger, written: Callable[..., io.StringIO]) -> None:
    out = written()
    logger.warning("odd page %s", 7, extra=EXTRA)
    logger.info("outside")
    first, second = out.getvalue().splitlines()
    assert first.endswith("WARNING test.logs [01234567/parse[4.2]#2] odd page 7")
    assert second.endswith("INFO    test.logs outside")


def test_json_is_one_object_per_line_with_all_fields(
    logger: logging.Logger, written: Callable[..., io.StringIO]
) -> None:
    out = written(json_lines=True, trace_ids=True)
    try:
        raise ValueError("line one\nline two")
    except ValueError:
        logger.exception("bad", extra={**EXTRA, "page": object(), "item": (7,)})
    (line,) = out.getvalue().splitlines()
    read = json.loads(line)
    assert (read["level"], read["logger"], read["message"]) == ("ERROR", "test.logs", "bad")
    assert (read["run_id"], read["stage"], read["item"], read["attempt"]) == (EXTRA["run_id"], "parse", [7], 2)
    assert "line two" in read["exception"]
    assert read["page"].startswith("<object")
    assert read["trace_id"] == tracing.trace_id_of("0123456789abcdef")
    assert len(read["span_id"]) == 16
    assert read["time"].endswith("+00:00")


def test_json_can_be_redacted(logger: logging.Logger, written: Callable[..., io.StringIO]) -> None:
    out = written(json_lines=True, redact=lambda line: {k: v for k, v in line.items() if k != "password"})
    logger.info("x", extra={"password": "secret"})
    assert "secret" not in out.getvalue()


def test_a_record_of_a_worker_comes_out_as_it_went_in(logger: logging.Logger) -> None:
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    logger.addHandler(Keep())
    logger.setLevel(logging.WARNING)
    sink = LogSink()
    data = {
        "level": 30,
        "logger": "test.logs",
        "message": "100 % odd",
        "created": 1234.5,
        "pathname": "docs.py",
        "lineno": 9,
        "func": "parse",
        "exc_text": "Traceback",
        "worker_pid": 77,
        "extra": {"page": 3, "msg": "not mine"},
    }
    sink.emit(Event("stage.log", 1, 1, "run-1", "parse", (4,), 2, "process", data))
    sink.emit(Event("stage.log", 1, 2, "run-1", "parse", (4,), 2, "process", {**data, "level": 10}))
    (record,) = records
    assert record.getMessage() == "100 % odd"
    assert (record.levelname, record.created, record.process, record.lineno, record.funcName) == (
        "WARNING",
        1234.5,
        77,
        9,
        "parse",
    )
    assert (record.run_id, record.stage, record.item, record.attempt, record.page) == ("run-1", "parse", (4,), 2, 3)  # type: ignore[attr-defined]
    assert "Traceback" in TextFormatter().format(record)
    assert json.loads(JsonFormatter().format(record))["page"] == 3


def test_events_are_logged_at_fitting_levels(docs_run: list[Event], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "stageflow.run")
    sink = LogSink(events=True)
    for event in docs_run:
        sink.emit(event)
    levels = [(r.levelname, r.getMessage()) for r in caplog.records if r.name == "stageflow.run"]
    assert ("INFO", "run completed: completed") in levels
    assert len([level for level, _ in levels if level == "ERROR"]) == 3
    assert [text for level, text in levels if level == "WARNING"] == [
        "fetch is tried again: timed out",
        "summary is tried again: not yet",
    ]


def test_records_of_a_run_inside_a_trace_have_its_id(caplog: pytest.LogCaptureFixture) -> None:
    sink = LogSink()
    outer = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    sink.emit(Event("run.started", 1, 0, "run-1", data={"traceparent": outer}))
    sink.emit(Event("stage.log", 1, 1, "run-1", "parse", None, 1, "process", {"level": 40, "message": "x"}))
    record = caplog.records[-1]
    TraceFilter().filter(record)
    assert record.trace_id == "0af7651916cd43dd8448eb211c80319c"  # type: ignore[attr-defined]


def test_install_lowers_a_level_and_never_raises_it(logger: logging.Logger) -> None:
    logger.setLevel(logging.DEBUG)
    install("WARNING", stream=io.StringIO(), logger="test.logs")
    assert logger.level == logging.DEBUG
    logger.setLevel(logging.ERROR)
    install("INFO", stream=io.StringIO(), logger="test.logs")
    assert logger.level == logging.INFO
