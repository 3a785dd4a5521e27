"""CPython's own tests of `concurrent.futures` pass against our executors; cpython_suite.py says what is left out."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name("cpython_suite.py")
MODULES = ["as_completed", "deadlock", "init", "process_pool", "shutdown", "thread_pool", "wait"]
#: those that sleep for seconds, and in how many parts at once
SLEEPERS = {"as_completed": 2, "shutdown": 2, "wait": 4}
QUICK = [(name, part, SLEEPERS.get(name, 1)) for name in MODULES for part in range(SLEEPERS.get(name, 1))]


def suite() -> Path:
    """A `test` package with the suite: this Python's, or that of a later one installed beside it."""
    named = os.environ.get("STAGEFLOW_CPYTHON_TESTS")
    beside = Path(sys.base_prefix).parent.glob("*/lib/python3.*/test")
    own = Path(os.__file__).with_name("test")
    for folder in [Path(named)] if named else [own, *sorted(beside, reverse=True)]:
        if (folder / "test_concurrent_futures" / "executor.py").is_file():
            return folder
    pytest.skip("no Python here has test.test_concurrent_futures as a package; STAGEFLOW_CPYTHON_TESTS may name one")


Runs = dict[tuple[str, int, int], subprocess.Popen[str]]


@pytest.fixture(scope="module")
def quick() -> Iterator[Runs]:
    """All modules at once: they mostly sleep."""
    command = [sys.executable, str(RUNNER), str(suite())]
    runs = {
        (name, part, parts): subprocess.Popen(
            [*command, f"test_{name}", "quick", str(part), str(parts)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, part, parts in QUICK
    }
    yield runs
    for run in runs.values():
        run.kill()
        run.communicate()


def check(run: subprocess.Popen[str], seconds: float) -> None:
    out, err = run.communicate(timeout=seconds)
    assert run.returncode == 0, err[-4000:]
    report = json.loads(out.splitlines()[-1])
    assert not report["bad"], err[-20_000:]
    assert report["ran"] >= 3
    assert all(report["left_out"].values())


@pytest.mark.parametrize(("name", "part", "parts"), QUICK)
def test_the_standards_own_tests_pass(quick: Runs, name: str, part: int, parts: int) -> None:
    check(quick[name, part, parts], 55)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MODULES)
def test_the_standards_own_tests_pass_under_every_start_method(name: str) -> None:
    command = [sys.executable, str(RUNNER), str(suite()), f"test_{name}", "walltime"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        check(run, 580)
