"""Bags: nothing is replaced by accident."""

import pickle
import threading

import pytest

from stageflow.context.bags import ContextBag, OutputBag
from stageflow.core.errors import DataConflictError, OutputConflictError


def test_a_key_is_set_once_unless_forced():
    bag = ContextBag.from_data({"a": 1})
    with pytest.raises(DataConflictError) as caught:
        bag.set("a", 2)
    assert caught.value.key == "a"
    bag.set_force("a", 3)
    bag.set("b", 4)
    assert bag.to_dict() == {"a": 3, "b": 4}
    assert (bag.get("a"), bag.get("x"), bag.get("x", 0), len(bag), bag.is_empty) == (3, None, 0, 2, False)
    assert (bag.keys(), "b" in bag, bag.contains_key("x")) == (["a", "b"], True, False)


def test_copies_are_independent_and_it_pickles():
    bag = ContextBag({"a": 1})
    copy, travelled = bag.copy(), pickle.loads(pickle.dumps(bag))
    bag.set("b", 2)
    bag.to_dict()["c"] = 3
    assert copy.to_dict() == travelled.to_dict() == {"a": 1}
    assert bag.keys() == ["a", "b"]


def test_one_of_many_threads_sets_a_key():
    bag, won, barrier = ContextBag(), [], threading.Barrier(8)

    def body(n: int) -> None:
        barrier.wait()
        try:
            bag.set("k", n)
        except DataConflictError:
            return
        won.append(n)

    threads = [threading.Thread(target=body, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [bag.get("k")]


def test_a_final_output_stays_and_others_may_be_written_again():
    outputs = OutputBag()
    outputs.set("s", {"v": 1}, attempt=2, is_final=False)
    outputs.set("s", {"v": 2}, attempt=1, is_final=False)
    outputs.set("s", {"v": 3}, attempt=3, is_final=True)
    with pytest.raises(OutputConflictError) as caught:
        outputs.set("s", {"v": 4}, attempt=4)
    assert (caught.value.stage, caught.value.attempt, caught.value.existing_attempt) == ("s", 4, 3)
    entry = outputs.get_entry("s")
    assert entry is not None
    assert (entry.data, entry.attempt, entry.is_final) == ({"v": 3}, 3, True)
    outputs.set_force("s", {"v": 5}, attempt=5)
    assert (outputs.get("s"), outputs.get("t"), outputs.stages()) == ({"v": 5}, None, ["s"])
    assert (len(outputs), outputs.is_empty, "s" in outputs, outputs.contains("t")) == (1, False, True, False)
    assert outputs.to_dict() == {"s": {"v": 5}}
