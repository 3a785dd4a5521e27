"""The fixture for users: the README's example as it stands, what it reports, and what it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stageflow import PipelineBuilder, StageFailedError
from stageflow.core.errors import DefinitionError
from stageflow.testing.benchmark import PaceStore, PipelineBenchmark, PipelineTooSlowError, StoredPace

README = Path(__file__).resolve().parents[2] / "benchmarks" / "README.md"


class Pedantic:
    """What is used of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info = {}

    def pedantic(self, target, *, setup, rounds):
        for _ in range(rounds):
            setup()
            target()


def double(items: int) -> int:
    return 2 * items


def fail(items: int) -> int:
    raise ValueError("no")


def graph(function=double):
    return PipelineBuilder("shop", inputs={"items": list}).map("double", function, over="items").build()


def measured(store: PaceStore, **options):
    benchmark = Pedantic()
    found = PipelineBenchmark(benchmark, store, "here")(
        graph(), {"items": list(range(500))}, rounds=3, lane="inline", **options
    )
    return found, benchmark.extra_info


def example() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    return blocks[0]


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.timeout(120)
def test_the_readmes_example_runs_stores_and_compares(tmp_path):
    (tmp_path / "test_shop_speed.py").write_text(example(), "utf-8")
    stored = pytest_in(tmp_path, "--pipeline-baseline-update", f"--benchmark-json={tmp_path / 'out.json'}")
    assert stored.returncode == 0, stored.stdout + stored.stderr
    paces = json.loads((tmp_path / "pipeline-benchmarks.json").read_text())
    assert list(paces) == ["test_shop_speed.py::test_doubling_keeps_its_pace"]
    told = json.loads((tmp_path / "out.json").read_text())["benchmarks"][0]["extra_info"]
    assert told["items"] == 5000
    assert told["items_per_second"] > 0
    assert told["peak_bytes"] > 1_000_000

    # A hundred times as fast as it can be: what runs now must look too slow.
    for pace in paces.values():
        for name in pace:
            pace[name] /= 100
    (tmp_path / "pipeline-benchmarks.json").write_text(json.dumps(paces))
    slow = pytest_in(tmp_path)
    assert slow.returncode == 1
    assert "PipelineTooSlowError" in slow.stdout


def test_it_reports_rates_and_waits_beside_the_times(tmp_path):
    found, info = measured(PaceStore(tmp_path / "none.json"))
    assert found.items == 500
    assert found.items_per_second == pytest.approx(500 / found.seconds)
    assert found.low <= found.ratio <= found.high
    assert found.baseline is None
    assert info["items_per_second"] == found.items_per_second
    assert set(info) == {"items", "items_per_second", "bytes_per_second", "wait", "peak_bytes", "ratio_to_loop"}
    assert not (tmp_path / "none.json").exists()


def test_a_stored_pace_comes_back_as_the_baseline(tmp_path):
    path = tmp_path / "paces.json"
    first, _ = measured(PaceStore(path, update=True))
    second, info = measured(PaceStore(path), tolerance=1000.0)
    assert second.baseline == StoredPace(first.ratio, first.low, first.high)
    assert info["ratio_to_baseline"] == pytest.approx(second.ratio / first.ratio)


def test_worse_in_every_round_and_by_more_than_the_tolerance_is_a_failure(tmp_path):
    store = PaceStore(tmp_path / "paces.json")
    store.put("here", StoredPace(1e-9, 1e-10, 2e-9))
    with pytest.raises(PipelineTooSlowError, match=r"times what paces\.json has"):
        measured(store)


def test_an_interval_that_touches_the_stored_one_is_no_failure(tmp_path):
    store = PaceStore(tmp_path / "paces.json")
    store.put("here", StoredPace(1e-9, 1e-10, 1e9))
    found, _ = measured(store)
    assert found.ratio > 1e-9


def test_an_iterable_of_inputs_is_one_run_each(tmp_path):
    benchmark = PipelineBenchmark(Pedantic(), PaceStore(tmp_path / "p.json"), "many")
    found = benchmark(graph(), ({"items": [number]} for number in range(4)), rounds=2, lane="inline")
    assert found.items == 4
    assert found.result.data("double")[0] == 6


def test_a_run_that_fails_is_not_measured(tmp_path):
    benchmark = PipelineBenchmark(Pedantic(), PaceStore(tmp_path / "p.json"), "fails")
    with pytest.raises(StageFailedError):
        benchmark(graph(fail), {"items": [1]}, rounds=1, lane="inline")


def test_a_damaged_store_and_no_items_are_said(tmp_path):
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(DefinitionError, match="does not hold stored paces"):
        measured(PaceStore(tmp_path / "p.json"))
    with pytest.raises(DefinitionError, match="no items"):
        PipelineBenchmark(Pedantic(), PaceStore(tmp_path / "q.json"), "none")(graph(), [], rounds=1)
