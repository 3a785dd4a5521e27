"""Failed items as files: what they hold, who may read them, and that a bad disk hurts nobody."""

import os
import stat
from pathlib import Path

import pytest

from stageflow.events.event import Event
from stageflow.report.failed import (
    FailedFileError,
    FailedInput,
    FailedItem,
    FailedItemSink,
    failed_path,
    find_failed,
    load_failed,
)


def failure(item: tuple[int, ...] | None = (7,), stage: str = "parse", run: str = "run-1", **data: object) -> Event:
    fields = {"error": "bad page", "error_type": "builtins.ValueError", "traceback": "Traceback: parse", **data}
    return Event("stage.failed", 10, 1, run, stage, item, 2, "process", fields)


def test_each_failed_item_is_one_file_with_its_input(tmp_path: Path, docs_run: list[Event]) -> None:
    sink = FailedItemSink(
        tmp_path,
        fetch=lambda e: FailedInput(values={"fetch": b"page", "n": e.item}, snapshot={"a": 1}, target="docs:graph"),
    )
    for event in docs_run:
        sink.emit(event)
    assert [p.relative_to(tmp_path).as_posix() for p in find_failed(tmp_path)] == [
        "run-1/parse/33.sfail",
        "run-1/parse/7.sfail",
    ]
    failed = load_failed(tmp_path / "run-1/parse/7.sfail")
    assert (failed.pipeline, failed.stage, failed.item, failed.attempt, failed.lane) == (
        "docs",
        "parse",
        (7,),
        1,
        "process",
    )
    assert failed.error_type == "builtins.ValueError"
    assert "bad 7" in failed.traceback
    assert "python" in failed.environment
    assert failed.target == "docs:graph"
    given = failed.load_input()
    assert given.values == {"fetch": b"page", "n": (7,)}
    assert given.snapshot == {"a": 1}
    assert sink.saved == 2


def test_files_are_private_and_others_files_are_not_unpickled(tmp_path: Path) -> None:
    sink = FailedItemSink(tmp_path / "f", fetch=lambda e: FailedInput(values={"x": 1}))
    sink.emit(failure())
    path = failed_path(tmp_path / "f", failure())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_failed(path).load_input().values == {"x": 1}
    path.chmod(0o622)
    with pytest.raises(FailedFileError, match="written by others"):
        load_failed(path).load_input()
    if os.getuid() == 0:
        path.chmod(0o600)
        os.chown(path, 12345, -1)
        with pytest.raises(FailedFileError, match="another user"):
            load_failed(path).load_input()


def test_inputs_are_saved_only_when_asked_for(tmp_path: Path) -> None:
    sink = FailedItemSink(tmp_path)
    sink.emit(failure())
    failed = load_failed(failed_path(tmp_path, failure()))
    assert not failed.has_input
    with pytest.raises(FailedFileError, match="not asked for"):
        failed.load_input()


def test_an_input_that_cannot_be_pickled_or_fetched_is_named(tmp_path: Path) -> None:
    import threading

    FailedItemSink(tmp_path, fetch=lambda e: FailedInput(values={"x": threading.Lock()})).emit(failure((1,)))

    def broken(event: Event) -> FailedInput:
        raise LookupError("gone")

    FailedItemSink(tmp_path, fetch=broken).emit(failure((2,)))
    FailedItemSink(tmp_path, fetch=lambda e: FailedInput(values={"f": lambda: 42})).emit(failure((3,)))
    one, two, three = (load_failed(failed_path(tmp_path, failure((n,)))) for n in (1, 2, 3))
    assert "lock" in (one.input_error or "")
    assert two.input_error == "LookupError: gone"
    assert three.load_input().values["f"]() == 42


def test_a_stage_that_failed_through_its_items_is_not_saved_again(tmp_path: Path) -> None:
    sink = FailedItemSink(tmp_path)
    sink.emit(failure((1,)))
    sink.emit(failure(None))
    sink.emit(failure(None, "other"))
    assert len(find_failed(tmp_path)) == 2


def test_names_become_safe_paths_that_never_meet(tmp_path: Path) -> None:
    hostile = ["../../etc", "a b", "a_b", "<script>", "..", "x" * 200, "日本"]
    paths = {failed_path(tmp_path, failure(stage=name)) for name in hostile}
    assert len(paths) == len(hostile)
    for path in paths:
        assert path.resolve().is_relative_to(tmp_path.resolve())
        assert len(path.relative_to(tmp_path).parts) == 3
    assert failed_path(tmp_path, failure(stage="parse")).parts[-2] == "parse"


def test_the_number_of_files_is_limited_and_redaction_can_refuse(tmp_path: Path) -> None:
    sink = FailedItemSink(tmp_path, limit=3, redact=lambda f: None if f.item == (0,) else f)
    for n in range(10):
        sink.emit(failure((n,)))
    assert (sink.saved, sink.skipped) == (3, 7)
    assert len(find_failed(tmp_path)) == 3


def test_a_folder_that_cannot_be_made_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    sink = FailedItemSink(blocker / "below")
    for n in range(3):
        sink.emit(failure((n,)))
    assert len(caplog.records) == 1
    assert (sink.saved, sink.skipped) == (0, 3)


def test_what_is_no_saved_failure_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.sfail"
    path.write_text("hello\n")
    with pytest.raises(FailedFileError, match="not a saved failure"):
        load_failed(path)
    path.write_text('{"format": 99, "stage": "a"}\n')
    with pytest.raises(FailedFileError, match="newer"):
        load_failed(path)
    sink = FailedItemSink(tmp_path, fetch=lambda e: FailedInput(values={"x": b"y" * 1000}))
    sink.emit(failure())
    whole = failed_path(tmp_path, failure())
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(FailedFileError, match="cut off"):
        load_failed(whole).load_input()
    assert FailedItem().has_input is False
