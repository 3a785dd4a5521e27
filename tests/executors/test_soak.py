"""The faults again and again while the machine has no time for them."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROUNDS = int(os.environ.get("STAGEFLOW_SOAK_ROUNDS", "20"))
FAULTS = Path(__file__).with_name("test_faults.py")


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """One process that spins for each core."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    yield
    for spinner in spinners:
        spinner.kill()
    for spinner in spinners:
        spinner.wait()


@pytest.mark.soak
@pytest.mark.timeout(ROUNDS * 300)
@pytest.mark.usefixtures("busy_machine")
def test_every_fault_twenty_times_under_load(tmp_path: Path) -> None:
    log = Path(os.environ.get("STAGEFLOW_SOAK_LOG", tmp_path / "soak.log"))
    for number in range(1, ROUNDS + 1):
        started = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FAULTS)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        lines = done.stdout.strip().splitlines() or [""]
        with log.open("a") as file:
            file.write(
                f"round {number}: {lines[-1]} ({time.monotonic() - started:.0f} s, load {os.getloadavg()[0]:.1f})\n"
            )
        assert done.returncode == 0, f"round {number}\n{done.stdout[-20_000:]}\n{done.stderr[-4000:]}"
        assert re.search(r"\d+ passed", lines[-1])
