"""`python -m benchmarks run | quick | check | scale | where | list | one`: see README.md of this folder."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks import bytecodes, gate, instructions, report, svg, where
from benchmarks.harness import MissingPeerError, Outcome, Report, Row, Scenario, measure
from benchmarks.noise import LIMIT, stolen
from benchmarks.peers import HERE, ROOT, machine
from benchmarks.peers import apart as peers_apart
from benchmarks.registry import SCENARIOS
from benchmarks.scale import OWN_BELOW, Scale, as_dict
from benchmarks.scale import measure as measure_scale

README: Final = HERE / "README.md"
PLOT: Final = HERE / "metg.svg"
#: what the measures may take in all; where it does not suffice for all, each gets its share
RUN_SECONDS: Final = 17 * 60.0
QUICK_SECONDS: Final = 150.0
LEAST_SECONDS: Final = 3.0
OPENING_SECONDS: Final = 30.0
QUICK_SCALE: Final = 0.2
QUICK_ROUNDS: Final = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 1 a regression (`check`) or a measure that broke, 2 usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="everything, peers beside us; under 20 minutes on 2 cores")
    quick = commands.add_parser("quick", help="ours and the standard library's; under 3 minutes")
    check = commands.add_parser("check", help="hold the present code against benchmarks/baseline.json")
    for each in (run, quick, check):
        each.add_argument("--json", type=Path, default=None, help="write every number here")
        each.add_argument(
            "--noise", type=float, default=LIMIT, help="wall over CPU time above which a round is dropped"
        )
        each.add_argument("only", nargs="*", help="names of scenarios or ids of measures (default: all)")
    run.add_argument("--write-readme", action="store_true", help="put the tables into benchmarks/README.md")
    run.add_argument("--no-scale", action="store_true", help="leave the simulation out")
    check.add_argument("--update", action="store_true", help="measure and write the baseline")
    check.add_argument("--no-instructions", action="store_true", help="leave valgrind out")
    check.add_argument("--counts-only", action="store_true", help="what noise cannot reach; leaves the ratios out")
    scale = commands.add_parser("scale", help="the scheduler on machines on paper, with up to 10,000,000 items")
    scale.add_argument("--scale", type=float, default=1.0, help="shrinks the streams")
    scale.add_argument("--write-readme", action="store_true", help="put the tables into benchmarks/README.md")
    commands.add_parser("where", help="where the microseconds and byte codes of a stage go")
    commands.add_parser("list", help="names of the scenarios")
    one = commands.add_parser("one", help="one scenario in this process, as JSON (used by the others)")
    one.add_argument("name")
    one.add_argument("--scale", type=float, default=1.0)
    one.add_argument("--rounds", type=int, default=None)
    one.add_argument("--noise", type=float, default=LIMIT)
    one.add_argument("--seconds", type=float, default=None, help="what the rounds may take")
    one.add_argument("--output", type=Path, default=None)
    given = parser.parse_args(arguments)
    if given.command == "list":
        for scenario in SCENARIOS.values():
            print(f"{scenario.name:20} {scenario.room:12} {', '.join(dict.fromkeys(row.id for row in scenario.rows))}")
        return 0
    if given.command == "where":
        print(where.table(where.look()))
        print(f"\n{bytecodes.table(bytecodes.per_completion((*bytecodes.SHAPES, *bytecodes.FLOORS)))}")
        return 0
    if given.command == "one":
        return _one(given)
    if given.command == "scale":
        return _scale(given)
    if given.command == "check":
        return _check(given)
    return _run(given, quick=given.command == "quick")


def _one(given: argparse.Namespace) -> int:
    if given.name not in SCENARIOS:
        print(f"there is no scenario {given.name!r}: see `python -m benchmarks list`", file=sys.stderr)
        return 2
    scenario = SCENARIOS[given.name]
    made = measure(scenario, scale=given.scale, rounds=given.rounds, noise_limit=given.noise, seconds=given.seconds)
    data = msgspec.json.encode(made)
    if given.output is None:
        print(data.decode())
    else:
        given.output.write_bytes(data)
    return 0


def _scale(given: argparse.Namespace) -> int:
    if given.scale >= OWN_BELOW:
        _prepare("wfcommons")
    tables = report.scale_tables(measure_scale(given.scale))
    print(tables)
    if given.write_readme:
        report.write_readme(README, {"scale": tables})
    return 0


def _chosen(only: Sequence[str]) -> list[Scenario]:
    if not only:
        return list(SCENARIOS.values())
    wanted = set(only)
    found = [s for s in SCENARIOS.values() if s.name in wanted or wanted & {row.id for row in s.rows}]
    unknown = wanted - {s.name for s in found} - {row.id for s in found for row in s.rows}
    if unknown:
        raise SystemExit(f"there is no scenario or measure called {', '.join(sorted(unknown))}")
    return found


def apart(scenario: Scenario, *, scale: float, rounds: int | None, noise: float, seconds: float) -> Report:
    """Measure a scenario in a process of its own, so that neither a crash nor its leftovers reach the next one.

    What is not over after twice its `seconds`, and some for opening and closing, is ended and counts as skipped.
    """
    began = time.monotonic()
    limit = 2 * seconds + OPENING_SECONDS
    with tempfile.TemporaryDirectory(prefix="stageflow-bench-") as folder:
        output = Path(folder, "report.json")
        command = [sys.executable, "-m", "benchmarks", "one", scenario.name, "--scale", str(scale)]
        command += ["--noise", str(noise), "--output", str(output)]
        command += ["--seconds", str(seconds)]
        if rounds is not None:
            command += ["--rounds", str(rounds)]
        why = ""
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
            if done.returncode:
                why = f"broke: {(done.stderr.strip().splitlines() or ['no message'])[-1][:160]}"
                print(done.stderr, file=sys.stderr)
        except subprocess.TimeoutExpired:
            why = f"took longer than {limit:.0f} s"
        if not why and output.exists():
            return msgspec.json.decode(output.read_bytes(), type=Report)
    rows = [_unmeasured(row, why or "gave no report") for row in scenario.rows]
    return Report(scenario=scenario.name, room=scenario.room, rows=rows, seconds=time.monotonic() - began)


def share_of(left: float, wanted: Sequence[float]) -> float:
    """The seconds that the first of several measures may take, where they all want so much and so much is left."""
    return max(LEAST_SECONDS, min(wanted[0], wanted[0] * left / sum(wanted)))


def _unmeasured(row: Row, why: str) -> Outcome:
    return Outcome(
        id=row.id,
        what=row.what,
        against=row.against,
        verdict="broken" if why.startswith("broke") else "skipped",
        bar=row.bar,
        at_most=row.at_most,
        unit=row.unit,
        gate=row.gate,
        note=why,
    )


def _run(given: argparse.Namespace, *, quick: bool) -> int:
    began = time.monotonic()
    budget = QUICK_SECONDS if quick else RUN_SECONDS
    here = machine()
    print(f"this machine right now: wall time is {stolen():.2f} times CPU time (1.0 is quiet)", flush=True)
    chosen = [one for one in _chosen(given.only) if one.quick or given.only or not quick]
    if any(one.name.startswith("stageflow-core") for one in chosen):
        _prepare("stageflow-core")
    if not (quick or given.only or given.no_scale):
        _prepare("wfcommons")
    scale, rounds = (QUICK_SCALE, QUICK_ROUNDS) if quick else (1.0, None)
    reports: list[Report] = []
    for place, scenario in enumerate(chosen):
        left = budget - (time.monotonic() - began)
        seconds = share_of(left, [one.seconds for one in chosen[place:]])
        made = apart(scenario, scale=scale, rounds=rounds, noise=given.noise, seconds=seconds)
        reports.append(made)
        verdicts = ", ".join(f"{row.id} {row.verdict}" for row in made.rows if row.bar is not None)
        print(f"{scenario.name:20} {made.seconds:6.1f} s  {verdicts}", flush=True)
    scale_found: Scale | None = None
    if not quick and not given.only and not given.no_scale:
        scale_found = measure_scale(1.0 if time.monotonic() - began < budget else 0.1)
        print(f"{'scale':20} {scale_found.seconds:6.1f} s", flush=True)
    seconds = time.monotonic() - began
    print()
    print(report.plain_table(reports))
    print()
    print(report.machine_text(here, seconds))
    curves: dict[str, Any] = {}
    for made in reports:
        curves = {**made.notes.get("curves", {}), **curves}
    _write_json(given.json, here, reports, scale_found, seconds)
    if not quick and given.write_readme:
        _write_readme(here, reports, curves, scale_found, seconds)
    return 1 if any(row.verdict == "broken" for made in reports for row in made.rows) else 0


def _prepare(package: str) -> None:
    """Make a peer's environment before anything is measured; where that does not work its rows say so."""
    try:
        peers_apart(package)
    except MissingPeerError as missing:
        print(missing, flush=True)


def _write_json(
    path: Path | None, here: dict[str, Any], reports: list[Report], scale: Scale | None, seconds: float
) -> None:
    target = path or ROOT / ".benchmarks" / "latest.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    made = {"machine": here, "seconds": seconds, "reports": [msgspec.to_builtins(r) for r in reports]}
    if scale is not None:
        made["scale"] = as_dict(scale)
    target.write_text(json.dumps(made, indent=1) + "\n")
    print(f"every number: {target}")


def _write_readme(
    here: dict[str, Any], reports: list[Report], curves: dict[str, Any], scale: Scale | None, seconds: float
) -> None:
    sections = {"table": f"{report.machine_text(here, seconds)}\n\n{report.table(reports)}"}
    if any(made.scenario == "stages" for made in reports):
        sections["where"] = where.table(where.look())
        sections["counts"] = bytecodes.table(bytecodes.per_completion((*bytecodes.SHAPES, *bytecodes.FLOORS)))
    if curves:
        PLOT.write_text(
            svg.curves(report.panels(curves), title="Efficiency by task length (METG where it crosses 50 %)")
        )
        sections["metg"] = report.metg_table(curves, reports) + f"\n\n![efficiency curves]({PLOT.name})"
    if scale is not None:
        sections["scale"] = report.scale_tables(scale)
    memory = next((r.notes for r in reports if r.scenario == "stage-memory" and r.notes), {})
    if memory:
        lines = [
            "| graph of 1,000,000 | graph, B | held, B | peak, B | build, us | run, us (per stage) |",
            "|---" * 6 + "|",
        ]
        for shape, told in memory.items():
            cells = [told["graph_bytes_per_stage"], told["held_bytes_per_stage"], told["bytes_per_stage"]]
            cells += [told["build_us_per_stage"], told["run_us_per_stage"]]
            lines.append(f"| {shape} | {' | '.join(report.number(cell) for cell in cells)} |")
        sections["memory"] = "\n".join(lines)
    report.write_readme(README, sections)
    print(f"written: {README.relative_to(ROOT)}")


def _check(given: argparse.Namespace) -> int:
    here = machine()
    baseline = gate.load()
    gated = [s for s in _chosen(given.only) if any(row.gate for row in s.rows)]
    by_key = {row.key: s for s in gated for row in s.rows if row.gate}

    def rows(keys: Sequence[str] | None) -> list[Outcome]:
        names = {s.name for s in gated} if keys is None else {by_key[key].name for key in keys}
        found: list[Outcome] = []
        for name in sorted(names):
            print(f"measuring {name}", flush=True)
            made = apart(SCENARIOS[name], scale=gate.SCALE, rounds=9, noise=given.noise, seconds=60.0)
            found += [row for row in made.rows if row.gate]
        return found

    version = here["python"].rsplit(".", 1)[0]
    counted = {} if given.only else _counts(with_instructions=not given.no_instructions)
    if given.update:
        return _update(baseline, here, [] if given.counts_only else rows(None), counted, version)
    foreign = gate.elsewhere(baseline, here)
    if foreign:
        print(f"the baseline is from another machine ({foreign}): ratios may move by {gate.TOLERANCE_ELSEWHERE:.0%}")
    tolerance = gate.TOLERANCE_ELSEWHERE if foreign else gate.TOLERANCE
    verdicts = [] if given.counts_only else gate.check(baseline, rows, tolerance=tolerance)
    for what, counts in counted.items():
        kept = getattr(baseline, what).get(version)
        if kept is None:
            print(f"the baseline has no {what} for Python {version}")
        else:
            verdicts += gate.compare_counts(what, kept, counts)
    for verdict in verdicts:
        print(f"{verdict.verdict:18} {verdict.key}: {verdict.before:.4g} -> {verdict.now:.4g} {verdict.note}")
    return 1 if any(verdict.verdict == "worse" for verdict in verdicts) else 0


def _counts(*, with_instructions: bool) -> dict[str, dict[str, float]]:
    """What no noise reaches: byte codes, and instructions where valgrind is."""
    print("counting byte codes of the engine", flush=True)
    found = {"bytecodes": bytecodes.per_completion()}
    if with_instructions:
        try:
            print("counting instructions of the scheduler", flush=True)
            found["instructions"] = instructions.per_completion()
        except instructions.NoCounterError as missing:
            print(f"instruction counts skipped: {missing}")
    return found


def _update(
    baseline: gate.Baseline,
    here: dict[str, Any],
    rows: list[Outcome],
    counted: dict[str, dict[str, float]],
    version: str,
) -> int:
    for row in rows:
        if row.ratio is not None:
            baseline.ratios[row.key] = gate.Kept(row.ratio, row.at_most)
        else:
            print(f"not measured, the old number stays: {row.key}: {row.note}")
    for what, counts in counted.items():
        getattr(baseline, what)[version] = counts
    if rows:
        baseline.machine = {name: here[name] for name in ("cpu", "cores", "python", "system", "date")}
    gate.save(baseline)
    print(f"written: {gate.BASELINE.relative_to(ROOT)} ({len(baseline.ratios)} ratios)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
