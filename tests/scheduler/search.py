"""The random search: `python tests/scheduler/search.py --seconds 60 [--processes 2] [--first SEED] [--logs FOLDER]`.

Random pipelines with random policies and faults, each in several orders and circumstances, through the machine alone,
in as many processes as there are cores. The books are audited after a twentieth of the turns and at the end; where
something is wrong, the log is looked through again with an audit after every turn, and written to FOLDER as the tests
of `logs` read it. Prints what was done and how fast; exit code 1 if something was found.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.path.insert(0, str(Path(__file__).parent))
    from simulator import Plan, Simulation
else:
    from stageflow_scheduler_simulator import Plan, Simulation

from stageflow.testing.strategies import random_sketch

ORDERS = 12  # of one pipeline: building it takes as long as running it three times
AUDITS = 0.05
#: in each the outcome is known, but for what was stopped
CIRCUMSTANCES: tuple[dict[str, float], ...] = ({}, {}, {"cancel": 0.03}, {"stops": 0.05})
HANG = 20  # CPU seconds after which one pipeline is a machine that does not come back


class NeverBackError(AssertionError):
    """One turn, or one simulation, takes for ever."""


def expired(signum: int, frame: Any) -> None:
    """What SIGPROF does."""
    raise NeverBackError(f"still running after {HANG} s of CPU time")


def circumstances(dice: random.Random, children: tuple[Plan, ...]) -> dict[str, Any]:
    """Lanes, memory, and what goes wrong."""
    return {
        **dice.choice(CIRCUMSTANCES),
        "lanes": {"process": dice.randint(1, 3), "thread": dice.randint(1, 3), "async": 4, "inline": 1},
        "ahead": {"process": dice.randint(1, 3)},
        "memory": dice.choice([0, 0, 15, 60]),
        "deaths": dice.choice([0, 0, 0.1, 0.3]),
        "children": dice.choice([(), children]),
        "crowds": dice.choice([0.0, 0.3]),
    }


def explore(seed: int, *, orders: int = ORDERS, audits: float = AUDITS, logs: Path | None = None) -> int:
    """One pipeline in several orders; how many signals the machine was told. Raises what is wrong."""
    dice = random.Random(seed)
    plan = Plan(random_sketch(dice, most=9, chain=seed % 3 == 0))
    children = (Plan(random_sketch(dice, most=3)), Plan(random_sketch(dice, most=3)))
    steps = 0
    for order in range(orders):
        simulation = Simulation(dice, audits=audits, **circumstances(dice, children))
        try:
            simulation.submit(plan)
            if dice.randint(0, 3) == 0:
                simulation.submit(plan)  # another run of the same graph beside it
            simulation.run()
            with simulation.explained():
                for run in simulation.layouts:
                    simulation.check_reference(run)
        except Exception:
            if logs is not None:
                simulation.save(logs / f"{seed}-{order}.json", f"seed {seed}, order {order}")
            raise
        steps += simulation.steps
    return steps


def search(number: int, processes: int, first: int, seconds: float, logs: Path, results: Any) -> None:
    """What one process does: every `processes`-th seed until the time is up."""
    signal.signal(signal.SIGPROF, expired)
    until, seed = time.monotonic() + seconds, first + number
    steps = pipelines = 0
    found: list[str] = []
    while time.monotonic() < until and len(found) < 10:
        signal.setitimer(signal.ITIMER_PROF, HANG)
        try:
            steps += explore(seed, logs=logs)
            pipelines += 1
        except Exception:
            found.append(f"seed {seed}:\n{traceback.format_exc(limit=-3)}")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        seed += processes
    results.put((pipelines, steps, time.process_time(), found))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--first", type=int, default=1_000_000)
    parser.add_argument("--logs", type=Path, default=Path("."))
    given = parser.parse_args()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(
            target=search, args=(number, given.processes, given.first, given.seconds, given.logs, results), daemon=True
        )
        for number in range(given.processes)
    ]
    began = time.monotonic()
    for worker in workers:
        worker.start()
    told = [results.get(timeout=given.seconds + 4 * HANG) for _ in workers]
    for worker in workers:
        worker.join()
    took = time.monotonic() - began
    pipelines, steps = sum(one[0] for one in told), sum(one[1] for one in told)
    found = [text for one in told for text in one[3]]
    cpu = sum(one[2] for one in told)
    print("\n".join(found), file=sys.stderr)
    print(
        json.dumps(
            {
                "pipelines": pipelines,
                "orders": ORDERS,
                "steps": steps,
                "steps_a_minute": round(steps / took * 60),
                "steps_a_cpu_minute": round(steps / cpu * 60),
                "found": len(found),
            }
        )
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
