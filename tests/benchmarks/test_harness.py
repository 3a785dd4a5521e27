"""The harness says what the numbers allow, and no more."""

import random
from contextlib import contextmanager

import pytest

from benchmarks.__main__ import share_of
from benchmarks.harness import Rounds, Row, Scenario, Sides, judge, measure
from benchmarks.report import plain_table, put, table
from benchmarks.stats import Interval, interval


def scenario(sides: Sides, *rows: Row, **options) -> Scenario:
    @contextmanager
    def opened(scale):
        yield sides

    return Scenario(name="made up", room="none", rows=rows, open=opened, **options)


def fixed(**costs: float) -> Sides:
    sides = Sides()
    for name, cost in costs.items():
        sides.add(name, lambda cost=cost: cost)
    return sides


def row(**options) -> Row:
    return Row(**{"id": "X1", "what": "w", "against": "peer", "over": "ours", "under": "peer"} | options)


def test_a_ratio_is_formed_within_each_round():
    costs = iter([(2.0, 1.0), (20.0, 10.0), (6.0, 3.0), (8.0, 4.0), (4.0, 2.0), (2.0, 1.0)])
    now: dict[str, float] = {}
    order: list[str] = []
    sides = Sides()

    def side(name):
        def cost():
            order.append(name)
            if len(order) % 2:
                now["ours"], now["peer"] = next(costs)
            return now[name]

        return cost

    sides.add("ours", side("ours"))
    sides.add("peer", side("peer"))
    made = measure(scenario(sides, row(bar=3.0)), noise_limit=99)
    assert made.rounds == 5
    assert made.rows[0].ratio == Interval(2.0, 2.0, 2.0, 0.0, 5)
    assert made.rows[0].verdict == "met"
    # the warm-up, then rounds in alternating order
    assert order[:6] == ["ours", "peer", "ours", "peer", "peer", "ours"]


@pytest.mark.parametrize(
    ("low", "high", "at_most", "verdict"),
    [
        (0.5, 0.9, True, "met"),
        (0.5, 1.1, True, "too noisy to tell"),
        (1.1, 1.3, True, "missed"),
        (1.1, 1.3, False, "met"),
        (0.9, 1.3, False, "too noisy to tell"),
        (0.5, 0.9, False, "missed"),
    ],
)
def test_a_verdict_needs_the_whole_interval(low, high, at_most, verdict):
    found = Interval((low + high) / 2, low, high, 0.1, 9)
    assert judge(row(bar=1.0, at_most=at_most), found) == verdict


def test_a_row_without_a_bar_is_only_measured():
    assert measure(scenario(fixed(ours=1.0, peer=2.0), row()), noise_limit=99).rows[0].verdict == "measured"


def test_more_rounds_are_run_while_the_bar_lies_inside():
    dice = random.Random(1)
    sides = Sides()
    sides.add("ours", lambda: dice.uniform(0.5, 1.5))
    sides.add("peer", lambda: 1.0)
    made = measure(scenario(sides, row(bar=1.0), max_rounds=9), noise_limit=99)
    assert made.rounds == 9
    assert made.rows[0].verdict == "too noisy to tell"


def test_a_measure_ends_when_its_seconds_and_half_as_many_are_over():
    now = [0.0]
    sides = Sides()

    def slow():
        now[0] += 10.0
        return 1.0

    sides.add("ours", slow)
    sides.add("peer", lambda: 1.0)
    made = measure(scenario(sides, row(bar=3.0)), noise_limit=99, seconds=20.0, clock=lambda: now[0])
    assert (made.rounds, made.seconds) == (3, 40.0)  # and one to warm up
    assert made.rows[0].verdict == "too noisy to tell"
    assert made.rows[0].note == "only 3 of 5 rounds were undisturbed or in time"


def test_each_measure_gets_its_share_of_what_is_left():
    assert share_of(100.0, [30.0, 20.0]) == 30.0
    assert share_of(25.0, [30.0, 20.0]) == 15.0
    assert share_of(-5.0, [30.0, 20.0]) == 3.0  # enough to say that it was too short


def test_a_missing_peer_is_skipped_with_its_reason():
    sides = fixed(ours=1.0)
    sides.lacks("peer", "it is not installed")
    made = measure(scenario(sides, row(bar=1.0)), noise_limit=99)
    assert (made.rows[0].verdict, made.rows[0].note) == ("skipped", "it is not installed")
    assert "skipped: it is not installed" in table([made])


def test_a_busy_machine_is_refused(monkeypatch):
    monkeypatch.setattr("benchmarks.harness.stolen", lambda: 3.0)
    made = measure(scenario(fixed(ours=1.0, peer=2.0), row(bar=1.0)))
    assert made.rounds == 0
    assert made.disturbed == 12
    assert made.rows[0].verdict == "too noisy to tell"
    assert made.rows[0].ratio is None


def test_disturbed_rounds_are_thrown_away(monkeypatch):
    probes = iter([1.0, 1.0, 2.0, 2.0, *[1.0] * 20])
    monkeypatch.setattr("benchmarks.harness.stolen", lambda: next(probes))
    run = Rounds(fixed(ours=1.0))
    assert [run.one() for _ in range(3)] == [True, False, True]
    assert len(run.kept) == 2


def test_a_side_may_have_several_costs():
    sides = Sides()
    sides.add("ours", lambda: {"wall": 2.0, "cpu": 3.0})
    sides.add("peer", lambda: {"wall": 1.0, "cpu": 1.0})
    rows = (row(over="ours wall", under="peer wall"), row(over="ours cpu", under="peer cpu"))
    made = measure(scenario(sides, *rows), noise_limit=99)
    assert [found.ratio.median for found in made.rows] == [2.0, 3.0]


def test_an_interval_covers_the_median_about_as_often_as_it_says():
    dice = random.Random(3)
    hits = 0
    for _ in range(200):
        found = interval([dice.lognormvariate(0.0, 0.2) for _ in range(11)], resamples=300)
        hits += found.low <= 1.0 <= found.high
    assert hits >= 176


def test_few_values_have_their_extremes_as_interval():
    found = interval([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (found.median, found.low, found.high) == (3.0, 1.0, 5.0)
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_the_table_is_put_between_its_markers():
    text = "a\n<!-- begin table: how -->\nold\n<!-- end table -->\nb\n"
    assert put(text, "table", "new") == "a\n<!-- begin table: how -->\n\nnew\n\n<!-- end table -->\nb\n"
    with pytest.raises(ValueError, match="no markers"):
        put(text, "other", "new")


def test_the_table_shows_ratio_spread_bar_and_verdict():
    made = measure(scenario(fixed(ours=1.0, peer=2.0), row(bar=0.25)), noise_limit=99)
    line = plain_table([made]).splitlines()[1]
    assert line.split() == ["X1", "w", "peer", "0.500", "(0.500", "to", "0.500)", "0%", "<=", "0.250", "**missed**"]
