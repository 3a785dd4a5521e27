"""The room's public names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import stageflow.tools


def test_every_public_name_is_there() -> None:
    for name in stageflow.tools.__all__:
        assert getattr(stageflow.tools, name).__module__.startswith("stageflow.tools."), name
    assert set(stageflow.tools.__all__) <= set(dir(stageflow.tools))


def test_the_room_brings_neither_click_nor_jsonschema_nor_the_engine() -> None:
    code = (
        "import sys\n"
        "from stageflow.tools import ApprovalStage, SQLiteApprovals, ToolExecutor, ToolRegistry, tool\n"
        "heavy = ('click', 'jsonschema', 'stageflow.runtime', 'stageflow.scheduler', 'stageflow.helpers')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"
