"""Futures that make their parts when asked: nothing is lost in the moment between."""

import concurrent.futures
import threading

import pytest

from stageflow_executors.light import FITS, LightFuture, set_results


def test_it_is_made_of_the_standards_parts() -> None:
    assert FITS
    future = LightFuture()
    assert vars(future) == {}
    assert not future.done()
    assert not future.running()
    assert "pending" in repr(future)
    assert set(vars(future)) == {"_parts"}


def test_it_changes_as_the_standards_does() -> None:
    cancelled = LightFuture()
    assert cancelled.cancel()
    assert cancelled.done()
    assert not cancelled.set_running_or_notify_cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        cancelled.result(1)
    plain = LightFuture()
    assert plain.set_running_or_notify_cancel()
    assert not plain.cancel()
    plain.set_result(5)
    assert plain.result() == plain.result(0) == 5
    assert plain.exception() is None
    with pytest.raises(concurrent.futures.InvalidStateError):
        plain.set_result(6)
    assert plain.result() == 5
    failed = LightFuture()
    failed.set_running_or_notify_cancel()
    failed.set_exception(KeyError("k"))
    with pytest.raises(KeyError):
        failed.result()
    waiting = LightFuture()
    with pytest.raises(TimeoutError):
        waiting.result(0.001)


@pytest.mark.parametrize("how", ["result", "callback", "as_completed", "wait", "cancel"])
def test_whoever_asks_while_results_arrive_hears_of_each_once(how: str) -> None:
    futures = [LightFuture() for _ in range(3000)]
    began = threading.Barrier(2)
    cancelled: set[LightFuture] = set()

    def resolve() -> None:
        began.wait(10)
        for at in range(0, len(futures), 7):
            some = [f for f in futures[at : at + 7] if f.set_running_or_notify_cancel()]
            set_results(some, [id(f) for f in some])

    thread = threading.Thread(target=resolve)
    thread.start()
    began.wait(10)
    heard: list[LightFuture] = []
    if how == "result":
        assert [f.result(10) for f in futures] == [id(f) for f in futures]
    elif how == "callback":
        for future in futures:
            future.add_done_callback(heard.append)
        thread.join(10)
        assert sorted(map(id, heard)) == sorted(map(id, futures))
    elif how == "as_completed":
        heard.extend(concurrent.futures.as_completed(futures, timeout=30))  # type: ignore[arg-type]
        assert sorted(map(id, heard)) == sorted(map(id, futures))
    elif how == "wait":
        done, rest = concurrent.futures.wait(futures, timeout=30)
        assert len(done) == len(futures)
        assert not rest
    else:
        cancelled.update(f for f in reversed(futures) if f.cancel())
        thread.join(10)
        for future in futures:
            assert future.cancelled() if future in cancelled else future.result(0) == id(future)
    thread.join(10)
    assert not thread.is_alive()
