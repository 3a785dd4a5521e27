"""The worked examples of this room's README, run as they stand."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import stageflow.helpers

README = Path(stageflow.helpers.__file__).with_name("README.md")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def output_of(number: int, folder: Path) -> list[str]:
    """What an example prints when it is run as a script in `folder`."""
    script = folder / f"example_{number}.py"
    script.write_text(EXAMPLES[number], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, capture_output=True, text=True, check=False, timeout=55
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_guardrail_example(tmp_path: Path) -> None:
    assert output_of(0, tmp_path) == ["Where is room 5? Ask the front desk.", "True"]


def test_the_analytics_example(tmp_path: Path) -> None:
    assert output_of(1, tmp_path) == ["42"]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    kinds = [event["event_type"] for event in events]
    assert {"run.started", "stage.started", "stage.completed", "run.completed"} <= set(kinds)
    assert {event.get("stage_name") for event in events if event["event_type"].startswith("stage.")} == {"double"}
    assert len({event["pipeline_run_id"] for event in events if "pipeline_run_id" in event}) == 1


def test_every_example_is_run() -> None:
    assert len(EXAMPLES) == 2
