"""Typed records across processes."""

from benchmarks.work import noop, records


def test_records_in_and_out(benchmark, pool):
    benchmark.group = "2,000 typed records in and out"
    batch = records(2000)
    assert benchmark(lambda: pool.submit(noop, batch).result())[-1] == batch[-1]
