"""Tokens: first reason wins, parents reach children, no callback is lost, deadlines need no timer."""

import pickle
import threading

import pytest

from stageflow.context.cancellation import CancellationToken
from stageflow.core.errors import NotShippableError, StageCancelledError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_first_reason_wins():
    token = CancellationToken()
    assert (token.cancelled, token.reason) == (False, None)
    assert token.cancel("first") is True
    assert token.cancel("second") is False
    assert (token.cancelled, token.reason) == (True, "first")


def test_callbacks_run_once_in_order_and_at_once_afterwards():
    token, seen = CancellationToken(), []
    token.on_cancel(lambda reason: seen.append(("a", reason)))
    token.on_cancel(lambda reason: seen.append(("b", reason)))
    token.cancel("x")
    token.cancel("y")
    token.on_cancel(lambda reason: seen.append(("late", reason)))
    assert seen == [("a", "x"), ("b", "x"), ("late", "x")]


def test_a_callback_taken_back_does_not_run():
    token, seen = CancellationToken(), []
    unregister = token.on_cancel(seen.append)
    unregister()
    unregister()
    token.cancel("x")
    assert seen == []


def test_a_raising_callback_is_logged_and_the_rest_run(caplog):
    token, seen = CancellationToken(), []
    token.on_cancel(lambda _: 1 / 0)
    token.on_cancel(seen.append)
    token.cancel("x")
    token.on_cancel(lambda _: 1 / 0)
    assert seen == ["x"]
    assert sum("ZeroDivisionError" in (r.exc_text or "") for r in caplog.records) == 2


def test_cancel_goes_down_the_tree_and_never_up():
    root = CancellationToken()
    child = root.child()
    grandchild, sibling = child.child(), root.child()
    seen = []
    grandchild.on_cancel(seen.append)
    child.cancel("child only")
    assert (root.cancelled, sibling.cancelled) == (False, False)
    assert grandchild.reason == "child only"
    assert seen == ["child only"]
    root.cancel("all")
    assert sibling.reason == "all"
    assert child.reason == "child only"


def test_a_child_of_a_cancelled_token_is_cancelled():
    root = CancellationToken()
    root.cancel("gone")
    child, seen = root.child(), []
    child.on_cancel(seen.append)
    assert child.cancel("mine") is False
    assert seen == ["gone"]


def test_a_closed_child_leaves_nothing_behind_in_its_parent():
    root = CancellationToken()
    for _ in range(100):
        child = root.child()
        child.on_cancel(lambda _: None)
        child.close()
    taken_back = root.child()
    taken_back.on_cancel(lambda _: None)()
    cancelled = root.child()
    cancelled.on_cancel(lambda _: None)
    cancelled.cancel()
    assert len(root._callbacks) == 0


def test_a_deadline_is_noticed_by_whoever_looks():
    clock = Clock()
    token = CancellationToken(deadline=105.0, clock=clock)
    seen = []
    token.on_cancel(seen.append)
    assert (token.cancelled, token.remaining) == (False, 5.0)
    clock.now = 105.0
    assert (token.cancelled, token.reason, token.remaining) == (True, "deadline", 0.0)
    assert seen == ["deadline"]


def test_a_child_keeps_the_earlier_deadline():
    clock = Clock()
    root = CancellationToken(deadline=110.0, clock=clock)
    assert root.with_deadline(50).deadline == 110.0
    soon = root.with_deadline(2)
    assert soon.deadline == 102.0
    clock.now = 103.0
    assert (soon.cancelled, root.cancelled) == (True, False)
    far = root.with_deadline(50)
    clock.now = 111.0
    assert far.reason == "deadline"


def test_a_cancel_after_the_deadline_does_not_replace_its_reason():
    clock = Clock()
    token = CancellationToken(deadline=101.0, clock=clock)
    clock.now = 102.0
    assert token.cancel("too late") is False
    assert token.reason == "deadline"


def test_a_probe_is_adopted_once_it_answers():
    answer: list[str | None] = [None]
    token = CancellationToken(probe=lambda: answer[0])
    assert not token.cancelled
    answer[0] = "asked"
    assert token.reason == "asked"
    answer[0] = "changed"
    assert token.reason == "asked"


def test_raise_if_cancelled_carries_the_reason():
    token = CancellationToken()
    token.raise_if_cancelled()
    token.cancel("enough")
    with pytest.raises(StageCancelledError) as caught:
        token.raise_if_cancelled()
    assert caught.value.reason == "enough"


def test_reset_makes_it_new():
    token, seen = CancellationToken(), []
    token.on_cancel(seen.append)
    token.reset()
    token.cancel("a")
    token.reset()
    assert not token.cancelled
    assert token.cancel("b") is True
    assert seen == []


def test_it_does_not_pickle_and_says_what_to_use():
    with pytest.raises(NotShippableError, match=r"ctx\.token"):
        pickle.dumps(CancellationToken())


def test_a_cancel_from_within_a_callback_or_registration_does_not_deadlock():
    token, seen = CancellationToken(), []
    token.on_cancel(lambda _: token.cancel("again"))
    token.on_cancel(lambda _: token.on_cancel(seen.append))
    token.cancel("x")
    assert seen == ["x"]


@pytest.mark.parametrize("through_child", [False, True])
def test_no_callback_is_lost_or_doubled_when_threads_race(through_child):
    for _ in range(200):
        root = CancellationToken()
        token = root.child() if through_child else root
        barrier = threading.Barrier(4)
        calls: list[int] = []

        def register(offset: int, token=token, barrier=barrier, calls=calls) -> None:
            barrier.wait()
            for number in range(10):
                token.on_cancel(lambda _, n=offset + number: calls.append(n))

        def cancel(reason: str, root=root, barrier=barrier) -> None:
            barrier.wait()
            root.cancel(reason)

        threads = [threading.Thread(target=register, args=(k * 100,)) for k in range(2)]
        threads += [threading.Thread(target=cancel, args=(name,)) for name in ("a", "b")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(calls) == [*range(10), *range(100, 110)]
        assert token.reason in ("a", "b")
