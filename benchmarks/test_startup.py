"""Fresh interpreters."""

import pytest

from benchmarks.measures.startup import OURS, THEIRS, first_result, import_seconds


@pytest.mark.parametrize("line", [OURS, THEIRS], ids=["stageflow", "standard library"])
def test_import(benchmark, line):
    benchmark.group = "import in a fresh interpreter"
    benchmark.pedantic(import_seconds(line), rounds=3)


@pytest.mark.parametrize("script", ["first_result_ours.py", "first_result_standard.py"])
def test_first_result(benchmark, script):
    benchmark.group = "fresh interpreter to first process result"
    benchmark.pedantic(first_result(script), rounds=5, warmup_rounds=1)
