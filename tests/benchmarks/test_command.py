"""The command and the page: names that exist, markers that are filled, peers that are named."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import README, main
from benchmarks.harness import MissingPeerError
from benchmarks.peers import need
from benchmarks.registry import SCENARIOS

ROOT = Path(__file__).resolve().parents[2]


def test_every_bar_of_the_project_has_a_row():
    ids = {row.id for scenario in SCENARIOS.values() for row in scenario.rows if row.bar is not None}
    latency, payloads = {"L1", "L2", "T1", "T2", "T3"}, {"P1", "P2", "P3", "P4", "P5"}
    assert ids == latency | payloads | {"S1", "S2", "S3", "S4", "C1", "C2", "C3", "E1", "E2", "M1"}


def test_keys_of_rows_are_unique():
    keys = [row.key for scenario in SCENARIOS.values() for row in scenario.rows]
    assert len(keys) == len(set(keys))


def test_list_names_every_scenario(capsys):
    assert main(["list"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(SCENARIOS)


def test_an_unknown_name_is_said():
    with pytest.raises(SystemExit, match="no scenario or measure called nothing"):
        main(["quick", "nothing"])
    assert main(["one", "nothing"]) == 2


def test_one_scenario_gives_its_report_as_json(tmp_path):
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks", "one", "idle-worker", "--noise", "99", "--rounds", "1"]
    subprocess.run([*command, "--output", str(output)], cwd=ROOT, check=True, timeout=100)
    told = json.loads(output.read_text())
    assert told["scenario"] == "idle-worker"
    assert told["rows"][0]["ratio"]["median"] > 0


def test_a_peer_that_is_not_installed_has_a_name():
    with pytest.raises(MissingPeerError, match="no_such_peer is not installed"):
        need("no_such_peer")


def test_the_page_has_every_section_that_the_command_writes():
    sections = re.findall(r"<!-- begin (\w+): ", README.read_text("utf-8"))
    assert sections == ["table", "where", "counts", "memory", "metg", "scale"]


def test_the_simulation_alone_is_printed_and_written(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- begin scale: a command -->\nold\n<!-- end scale -->\nafter\n")
    monkeypatch.setattr("benchmarks.__main__.README", page)
    assert main(["scale", "--scale", "0.001", "--write-readme"]) == 0
    printed = capsys.readouterr().out.strip()
    assert "| 1,024 | 20,000 |" in printed
    assert printed in page.read_text()
    assert "old" not in page.read_text()
