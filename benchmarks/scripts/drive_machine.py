"""Drive the pure scheduler through some runs of each shape, and nothing else: `drive_machine.py SLOW SHAPE=RUNS ...`.

SLOW is a number of turns of a useless loop per signal, by which a test makes the path slower.
"""

import gc
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[2] / "executors")]

from benchmarks.instructions import SHAPES  # noqa: E402
from benchmarks.simulated import Simulation, layout_of, stream_layout  # noqa: E402


def simulation(shape: str, layouts: dict) -> Simulation:
    """A fresh run."""
    if shape == "blocks":
        return Simulation(layouts[shape], 4, lambda stage: 1e-4, items=SHAPES[shape])
    return Simulation(layouts[shape], 4, lambda stage: 0.001)


def main(slow: int, runs: dict[str, int]) -> None:
    """All runs of all shapes."""
    layouts = {
        "chain": layout_of([[i - 1] if i else [] for i in range(SHAPES["chain"])]),
        "fan-out": layout_of([[0] if i else [] for i in range(SHAPES["fan-out"])]),
        "blocks": stream_layout(),
    }
    gc.collect()
    gc.disable()  # when it would run depends on what else was allocated
    for shape, times in runs.items():
        for _ in range(times):
            one = simulation(shape, layouts)
            if slow:
                one.machine.handle = slower(one.machine.handle, slow)
            if one.run().finished != "completed":
                raise SystemExit(f"a run of {shape} did not complete")


def slower(handle, turns):
    """`handle` after a useless loop."""

    def wrapped(signal, now):
        for _ in range(turns):
            pass
        return handle(signal, now)

    return wrapped


if __name__ == "__main__":
    main(int(sys.argv[1]), {name: int(times) for name, times in (pair.split("=") for pair in sys.argv[2:])})
