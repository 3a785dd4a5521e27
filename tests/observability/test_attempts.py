"""Attempts that were followed by another are told once, with their times."""

from stageflow.events.event import Event
from stageflow.observability.attempts import RetriedAttempts


def event(type_: str, attempt: int = 1, item: tuple[int, ...] | None = None, **data: object) -> Event:
    return Event(type_, 1, 1, "r", "a", item, attempt, "async", dict(data))


def test_an_attempt_and_its_retry_become_one() -> None:
    join = RetriedAttempts()
    assert join.add(event("stage.attempt", status="fail", seconds=0.5)) is None
    told = join.add(event("stage.retrying", error="boom"))
    assert told is not None
    assert (told.type, told.data["seconds"], told.data["error"], told.data["status"]) == (
        "stage.attempt",
        0.5,
        "boom",
        "retry",
    )
    assert join.add(event("stage.attempt", 2, status="ok")) is None
    assert join.add(event("stage.completed", 2)) is None


def test_an_attempt_that_says_so_itself_is_told_at_once_and_not_again() -> None:
    join = RetriedAttempts()
    assert join.add(event("stage.attempt", final=False, status="retry")) is not None
    assert join.add(event("stage.retrying")) is None
    assert join.add(event("stage.retrying")) is not None


def test_a_last_attempt_is_left_to_the_end_of_its_stage() -> None:
    join = RetriedAttempts()
    assert join.add(event("stage.attempt", status="fail")) is None
    assert join.add(event("stage.failed")) is None
    assert not join._waiting


def test_items_are_told_apart_and_a_retry_alone_stands_for_an_attempt() -> None:
    join = RetriedAttempts()
    join.add(event("stage.attempt", item=(1,), status="fail", seconds=1.0))
    told = join.add(event("stage.retrying", item=(2,), error="x"))
    assert told is not None
    assert told.item == (2,)
    assert "seconds" not in told.data
