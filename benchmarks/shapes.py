"""Workflows of the real world: from wfcommons where it can be had, else generators of the same shapes.

A workflow is (dependencies by number, seconds by number), stages in topological order.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.harness import MissingPeerError
from benchmarks.peers import HERE, apart

NAMES: Final = ("Montage", "Epigenomics", "1000Genome")
Workflow = tuple[list[list[int]], list[float]]


def workflows(size: int, *, seed: int = 3, own: bool = False) -> tuple[str, dict[str, Workflow]]:
    """(where they come from, name -> workflow of about `size` tasks)."""
    if not own:
        try:
            python = apart("wfcommons")
            return "wfcommons", _from_wfcommons(python, size, seed)
        except (MissingPeerError, subprocess.SubprocessError, ValueError, OSError):
            pass
    dice = random.Random(seed)
    made = {"Montage": _montage(size, dice), "Epigenomics": _epigenomics(size, dice), "1000Genome": _genome(size, dice)}
    return "generators of the same shapes (wfcommons is not here)", made


def _from_wfcommons(python: Path, size: int, seed: int) -> dict[str, Workflow]:
    command = [str(python), "-P", str(HERE / "scripts" / "wfcommons_shapes.py"), str(size), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    told = json.loads(done.stdout.splitlines()[-1])
    return {name: (row["deps"], row["seconds"]) for name, row in told.items()}


class _Maker:
    """Adds tasks of a kind whose durations are spread log-normally around a mean."""

    def __init__(self, dice: random.Random) -> None:
        self.deps: list[list[int]] = []
        self.seconds: list[float] = []
        self.dice = dice

    def add(self, mean: float, deps: Sequence[int] = ()) -> int:
        self.deps.append(list(deps))
        self.seconds.append(mean * self.dice.lognormvariate(-0.05, 0.32))
        return len(self.deps) - 1

    def done(self) -> Workflow:
        return self.deps, self.seconds


def _montage(size: int, dice: random.Random) -> Workflow:
    """Project each image, fit the differences of neighbours, one model, correct each, one mosaic."""
    make = _Maker(dice)
    images = max(2, size // 5)
    projected = [make.add(12.0) for _ in range(images)]
    fits = [make.add(1.5, (projected[i], projected[(i + step) % images])) for i in range(images) for step in (1, 2, 3)]
    concatenated = make.add(60.0, fits)
    model = make.add(90.0, [concatenated])
    corrected = [make.add(1.2, (model, image)) for image in projected]
    table = make.add(15.0, corrected)
    added = make.add(70.0, [table, *corrected])
    make.add(40.0, [added])
    return make.done()


def _epigenomics(size: int, dice: random.Random) -> Workflow:
    """Lanes of four steps per chunk, merged per lane, then all."""
    make = _Maker(dice)
    lanes = 4
    chunks = max(1, size // (4 * lanes))
    merged = []
    for _ in range(lanes):
        split = make.add(35.0)
        maps = []
        for _ in range(chunks):
            last = split
            for mean in (2.0, 1.0, 0.5, 200.0):
                last = make.add(mean, [last])
            maps.append(last)
        merged.append(make.add(10.0, maps))
    whole = make.add(40.0, merged)
    index = make.add(45.0, [whole])
    make.add(55.0, [index])
    return make.done()


def _genome(size: int, dice: random.Random) -> Workflow:
    """Per chromosome: many cuts, one merge, one sift; then overlap and frequency tasks that read both."""
    make = _Maker(dice)
    chromosomes = 10
    cuts = max(2, size // chromosomes - 16)
    for _ in range(chromosomes):
        parts = [make.add(220.0) for _ in range(cuts)]
        merge = make.add(60.0, parts)
        sift = make.add(15.0)
        for _ in range(7):
            make.add(130.0, (merge, sift))
            make.add(240.0, (merge, sift))
    return make.done()
