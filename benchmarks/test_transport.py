"""Arrays across processes."""

import numpy as np
import pytest

from benchmarks.work import plus_one


@pytest.mark.parametrize("numbers", [128, 131_072, 2_000_000], ids=["1 KB", "1 MB", "16 MB"])
def test_array_in_and_out(benchmark, pool, numbers):
    array = np.arange(numbers, dtype=np.float64)
    benchmark.group = f"{array.nbytes:,} bytes in and out"
    assert benchmark(lambda: pool.submit(plus_one, array).result())[-1] == array[-1] + 1
