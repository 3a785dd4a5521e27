"""Calls without work through the two pools."""

from benchmarks.work import noop


def test_round_trip(benchmark, pool):
    benchmark.group = "no-op round trip"
    assert benchmark(lambda: pool.submit(noop, 1).result()) == 1


def test_a_future_each(benchmark, pool):
    benchmark.group = "2,000 no-ops"

    def all_of_them():
        return [future.result() for future in [pool.submit(noop, number) for number in range(2000)]]

    assert benchmark(all_of_them)[-1] == 1999
