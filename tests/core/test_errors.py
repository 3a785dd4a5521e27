"""Every error says what to do, pickles with all it has, and comes out of another process as it went in."""

import json
import pickle

import msgspec
import pytest

from stageflow.core import errors
from stageflow.core.errors import (
    ContractErrorInfo,
    PipelineValidationError,
    StageflowError,
    StageTimeoutError,
    WorkerDiedError,
)
from stageflow.core.failure import RemoteError, RemoteTraceback, capture, revive

EVERY = sorted(
    (found for found in vars(errors).values() if isinstance(found, type) and issubclass(found, StageflowError)),
    key=lambda found: found.__name__,
)


@pytest.mark.parametrize("cls", EVERY)
def test_every_error_pickles_with_all_its_fields(cls):
    error = cls("what happened", hint="what to do")
    error.stage = "parse"
    again = pickle.loads(pickle.dumps(error, 5))
    assert type(again) is cls
    assert (str(again), again.hint, again.stage) == (str(error), "what to do", "parse")
    assert "what happened" in str(again)
    json.dumps(again.to_dict())


def test_every_code_belongs_to_one_error():
    codes = [cls.code for cls in EVERY]
    assert sorted(set(codes)) == sorted(codes)


def test_all_problems_of_a_pipeline_are_in_one_text():
    first = ContractErrorInfo("C-1", "cycle a, b", "cut it").with_context("stages", ["a", "b"])
    error = PipelineValidationError(problems=[first, ContractErrorInfo("C-2", "no such stage")], pipeline="p")
    assert str(error) == (
        "2 problems in the definition of pipeline 'p':\n  [C-1] cycle a, b\n      -> cut it\n  [C-2] no such stage"
    )
    assert (error.codes, error.stages, error.error_info) == (("C-1", "C-2"), ("a", "b"), first)
    assert pickle.loads(pickle.dumps(error)).problems == error.problems


def test_the_description_of_a_problem_is_changed_by_copy():
    info = ContractErrorInfo("C-1", "s")
    changed = info.with_fix_hint("f").with_doc_url("u").with_context("a", 1).merge_context({"a": 2, "b": 3})
    assert info.to_dict() == {"code": "C-1", "summary": "s", "fix_hint": None, "doc_url": None, "context": {}}
    assert changed.to_dict() == {
        "code": "C-1",
        "summary": "s",
        "fix_hint": "f",
        "doc_url": "u",
        "context": {"a": 2, "b": 3},
    }


def raised(error):
    try:
        raise error
    except BaseException as caught:
        return caught


def across(info):
    """As the frame between two processes carries it."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(info), type=type(info))


def test_an_exception_comes_out_as_it_went_in_with_its_own_traceback():
    error = raised(KeyError("missing"))
    error.add_note("while indexing")
    again = revive(across(capture(error, lane="process", worker_pid=7, attempt=2, item=(3, 1))))
    assert type(again) is KeyError
    assert again.args == ("missing",)
    assert again.__notes__ == ["while indexing"]
    assert isinstance(again.__cause__, RemoteTraceback)
    assert "in raised" in str(again.__cause__)


class TwoArguments(Exception):
    """Unpickles by calling its class with one argument, which fails: `pickle.loads` alone raises in the reader."""

    def __init__(self, first, second):
        super().__init__(first)
        self.second = second


class Hostile(Exception):
    @property
    def __notes__(self):
        raise AttributeError("no notes")

    def __str__(self):
        raise RuntimeError("no text")

    def __reduce__(self):
        raise RuntimeError("no pickle")


class Numbered(Exception):
    """Unpickles as another: made anew with its own text as argument, it says it twice."""

    def __init__(self, what, number=7):
        super().__init__(f"{number}: {what}")
        self.number = number


@pytest.mark.parametrize("error", [TwoArguments("a", "b"), Numbered("page", 404), OSError(2, "gone", "file.txt")])
def test_an_exception_whose_init_has_arguments_of_its_own_comes_out_as_it_went_in(error):
    again = revive(across(capture(raised(error))))
    assert type(again) is type(error)
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


def test_an_exception_that_cannot_be_pickled_is_described():
    error = TwoArguments("a", "b")
    error.handle = lambda: None
    info = across(capture(raised(error)))
    assert info.pickled is None
    again = revive(info)
    assert isinstance(again, RemoteError)
    assert "TwoArguments: a" in str(again)
    assert again.error_info == info


def test_describing_an_exception_never_raises():
    info = capture(raised(Hostile()))
    assert info.message == "<str() of the exception raised RuntimeError>"
    assert info.pickled is None
    assert isinstance(revive(info), RemoteError)


class Moody(Exception):
    """What it is asked for beside its text raises, or is no number of seconds."""

    def __init__(self, retry_after=None):
        super().__init__("moody")
        self.retry_after = retry_after

    @property
    def retryable(self):
        raise RuntimeError("who knows")


@pytest.mark.parametrize("wait", [float("nan"), float("inf"), -1, True, "soon", 10**400])
def test_a_wait_that_is_no_number_of_seconds_is_none(wait):
    info = across(capture(raised(Moody(wait))))
    assert (info.message, info.retry_after, info.retryable) == ("moody", None, False)


def test_a_text_that_utf_8_has_no_bytes_for_crosses():
    error = ValueError("cannot open 'caf\udce9.txt'")
    error.add_note("caf\udce9")
    info = across(capture(raised(error)))
    assert info.message == r"cannot open 'caf\udce9.txt'"
    assert r"caf\udce9" in info.traceback
    assert str(revive(info)) == str(error), "the exception itself keeps its text"


def test_a_recursion_error_does_not_fill_a_frame():
    def deeper(n):
        return deeper(n + 1) + len(str(n))

    with pytest.raises(RecursionError) as endless:
        deeper(0)
    assert len(msgspec.msgpack.encode(capture(endless.value))) < 256 * 1024
    assert len(capture(ValueError("x" * 10**6)).message) < 20_000


def test_causes_and_hints_of_retrying_travel():
    error = raised(ValueError("late"))
    error.retry_after = 3
    error.retryable = True
    error.__cause__ = OSError("reset")
    info = across(capture(error))
    assert (info.retry_after, info.retryable) == (3.0, True)
    assert (info.cause.type, info.cause.message) == ("OSError", "reset")
    loop = ValueError("loop")
    loop.__cause__ = loop
    assert capture(loop).cause.type == "ValueError"


def test_what_is_known_of_a_lost_worker_and_of_a_timeout_is_kept():
    lost = WorkerDiedError("lost", signal=9, exit_code=None, oom_killed=True, rss_bytes=5, stderr_tail="Killed")
    info = capture(lost)
    assert (info.signal, info.oom_killed, info.rss_bytes, info.stderr_tail) == (9, True, 5, "Killed")
    assert info.code == "SF-WORKER-DIED"
    late = capture(StageTimeoutError("late", elapsed=2.5, limit=2.0))
    assert (late.elapsed, late.limit) == (2.5, 2.0)
