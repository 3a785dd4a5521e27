"""The gate: a path that is 30 % slower is caught, and code that has not changed passes, time after time."""

import random

import pytest

from benchmarks import bytecodes, gate, instructions
from benchmarks.harness import Outcome
from benchmarks.stats import Interval, interval
from benchmarks.work import burn

KEYS = ("X1 a / peer", "X2 b / peer")


class Machine:
    """A noisy one: a measure gives ratios around their true value, some far off, as neighbours come and go."""

    def __init__(self, seed: int, factors: dict[str, float] | None = None) -> None:
        self.dice = random.Random(seed)
        self.factors = factors or {}

    def measure(self, keys=None) -> list[Outcome]:
        rows = []
        for key in KEYS:
            if keys is None or key in keys:
                true = 0.5 * self.factors.get(key, 1.0)
                values = [
                    true * self.dice.lognormvariate(0.0, 0.06) * (1.6 if self.dice.random() < 0.08 else 1.0)
                    for _ in range(11)
                ]
                id, what = key.split(" / ")[0].split(" ")
                rows.append(
                    Outcome(id=id, what=what, against="peer", verdict="measured", ratio=interval(values), gate=True)
                )
        return rows


def baseline() -> gate.Baseline:
    return gate.Baseline(ratios={row.key: gate.Kept(row.ratio, True) for row in Machine(0).measure()})


def test_thirty_percent_slower_is_caught():
    kept = baseline()
    caught = 0
    for seed in range(1, 21):
        verdicts = {v.key: v.verdict for v in gate.check(kept, Machine(seed, {KEYS[1]: 1.3}).measure)}
        assert verdicts[KEYS[0]] != "worse"
        caught += verdicts[KEYS[1]] == "worse"
    assert caught >= 18


def test_unchanged_code_passes_every_time():
    kept = baseline()
    for seed in range(100, 200):
        assert all(v.verdict != "worse" for v in gate.check(kept, Machine(seed).measure)), seed


def test_what_looks_worse_once_is_measured_again():
    kept = baseline()
    asked = []
    slow, same = Machine(5, {KEYS[0]: 1.5}), Machine(6)

    def measure(keys):
        asked.append(keys)
        return (slow if keys is None else same).measure(keys)

    assert {v.verdict for v in gate.check(kept, measure)} <= {"same", "better"}
    assert asked == [None, [KEYS[0]]]


@pytest.mark.parametrize(
    ("at_most", "now", "verdict"),
    [
        (True, Interval(1.3, 1.25, 1.35, 0.1, 9), "worse"),
        (True, Interval(1.3, 1.0, 1.6, 0.1, 9), "same"),
        (True, Interval(1.06, 1.055, 1.07, 0.1, 9), "same"),
        (True, Interval(0.7, 0.6, 0.8, 0.1, 9), "better"),
        (False, Interval(0.7, 0.6, 0.8, 0.1, 9), "worse"),
        (False, Interval(1.3, 1.25, 1.35, 0.1, 9), "better"),
        (True, Interval(1.3, 0.5, 4.0, 0.1, 9), "too noisy to tell"),
    ],
)
def test_worse_needs_both_a_gap_and_a_distance(at_most, now, verdict):
    kept = gate.Kept(Interval(1.0, 0.95, 1.05, 0.05, 9), at_most)
    assert gate.compare_ratio("k", kept, now).verdict == verdict


def test_a_row_that_is_missing_or_new_is_said_and_is_no_failure():
    gone = Outcome(id="X1", what="a", against="peer", verdict="skipped", note="no peer", gate=True)
    fresh = Outcome(id="X9", what="z", against="peer", verdict="met", ratio=Interval(1, 1, 1, 0, 5), gate=True)
    other = Outcome(id="X8", what="y", against="peer", verdict="met", ratio=Interval(1, 1, 1, 0, 5))
    found = {v.key: (v.verdict, v.note) for v in gate.compare(baseline(), [gone, fresh, other])}
    assert found == {"X1 a / peer": ("not measured", "no peer"), "X9 z / peer": ("new", "")}


def test_the_baseline_survives_its_file(tmp_path):
    kept = baseline()
    kept.instructions["3.11"] = {"chain": 1234.5}
    gate.save(kept, tmp_path / "b.json")
    again = gate.load(tmp_path / "b.json")
    assert again.ratios == kept.ratios
    assert again.instructions == kept.instructions
    assert gate.load(tmp_path / "none.json").ratios == {}


def test_the_committed_baseline_can_be_read_and_names_its_machine():
    kept = gate.load()
    assert kept.ratios
    assert kept.machine["cores"] >= 1
    assert gate.elsewhere(kept, kept.machine) == ""
    assert "Python" in gate.elsewhere(kept, {**kept.machine, "python": "3.99.1"})


def test_counts_are_held_to_three_percent():
    found = gate.compare_counts(
        "instructions", {"chain": 1000.0, "blocks": 100.0}, {"chain": 1031.0, "blocks": 102.0, "x": 1.0}
    )
    assert [v.verdict for v in found] == ["worse", "same", "new"]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_thirty_percent_more_byte_codes_are_caught_and_ten_unchanged_runs_pass():
    kept = bytecodes.per_completion()
    shapes = ["engine chain", "blocks"]
    turns = 50
    some = bytecodes.per_completion(shapes, slow=turns)
    for shape in shapes:
        per_turn = (some[shape] - kept[shape]) / turns
        slow = bytecodes.per_completion([shape], slow=round(0.3 * kept[shape] / per_turn))
        assert slow[shape] == pytest.approx(1.3 * kept[shape], rel=0.05)
        assert [v.verdict for v in gate.compare_counts("bytecodes", kept, slow)] == ["worse"]
    for _ in range(10):
        again = bytecodes.per_completion()
        assert {v.verdict for v in gate.compare_counts("bytecodes", kept, again)} == {"same"}, again


@pytest.mark.timeout(60)
def test_a_slower_path_has_more_byte_codes_and_the_same_path_as_many():
    shapes = ["engine fan-out, sink"]
    kept = bytecodes.per_completion(shapes)
    assert [v.verdict for v in gate.compare_counts("bytecodes", kept, bytecodes.per_completion(shapes))] == ["same"]
    slow = bytecodes.per_completion(["engine chain"], slow=200)["engine chain"]
    assert slow > 1.3 * bytecodes.per_completion(["engine chain"])["engine chain"]


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_thirty_percent_more_instructions_in_the_scheduler_are_caught_and_ten_unchanged_runs_pass():
    try:
        instructions.available()
    except instructions.NoCounterError as missing:
        pytest.skip(str(missing))
    kept = instructions.per_completion(["chain"])
    turns = 100
    with_turns = instructions.per_completion(["chain"], slow=turns)["chain"]
    per_turn = (with_turns - kept["chain"]) / turns
    slow = instructions.per_completion(["chain"], slow=round(0.3 * kept["chain"] / per_turn))
    assert slow["chain"] == pytest.approx(1.3 * kept["chain"], rel=0.05)
    assert [v.verdict for v in gate.compare_counts("instructions", kept, slow)] == ["worse"]
    for _ in range(10):
        again = instructions.per_completion(["chain"])
        assert [v.verdict for v in gate.compare_counts("instructions", kept, again)] == ["same"], again


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_real_path_slowed_by_thirty_percent_is_caught_by_its_ratio():
    import time

    def cost(turns: int) -> float:
        began = time.thread_time()
        burn(turns)
        return time.thread_time() - began

    def rows(turns: int):
        def measure(keys):
            ratios = [cost(turns) / cost(200_000) for _ in range(15)]
            return [Outcome(id="X1", what="a", against="peer", verdict="measured", ratio=interval(ratios), gate=True)]

        return measure

    kept = gate.Baseline(ratios={KEYS[0]: gate.Kept(rows(200_000)(None)[0].ratio, True)})
    assert [v.verdict for v in gate.check(kept, rows(260_000))] == ["worse"]
    for _ in range(10):
        assert [v.verdict for v in gate.check(kept, rows(200_000))] == ["same"]
