"""Golden files: what a pipeline says, compared with what it said when somebody last looked.

    assert_golden(Path(__file__).with_name("events.jsonl"), golden_events(sink.events))

Set `STAGEFLOW_UPDATE_GOLDEN=1` to write the files anew; look at the difference before you commit it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from stageflow.events.event import Event

__all__ = ["assert_golden", "golden_events", "golden_text"]

#: fields of events whose values differ from run to run
VOLATILE: Final = frozenset(
    (
        "bytes_in",
        "bytes_out",
        "cpu_seconds",
        "delay_ms",
        "duration_ms",
        "elapsed",
        "memory_limit",
        "monotonic",
        "pid",
        "queued_ms",
        "rss_bytes",
        "seconds",
        "started",
        "traceback",
        "worker_pid",
        "workers",
    )
)
_UUID: Final = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
_NUMBER: Final = re.compile(r"\b\d+(?:\.\d+)?(?= ?(?:(?:ms|s|MB|KB|GB|MiB|KiB|GiB)\b|%))")


def golden_events(events: Iterable[Event]) -> str:
    """Events as JSON lines without what differs from run to run (times, ids, process numbers)."""
    lines = []
    for event in events:
        shown: dict[str, Any] = {"type": event.type}
        for name in ("stage", "item", "attempt", "lane"):
            if getattr(event, name) is not None:
                shown[name] = getattr(event, name)
        data = _still(event.data)
        if data:
            shown["data"] = data
        lines.append(json.dumps(shown, sort_keys=True, default=str))
    return "\n".join(lines) + "\n"


def golden_text(text: str) -> str:
    """A report without what differs from run to run: identifiers, and numbers with a unit of time, size or share."""
    lines = _NUMBER.sub("N", _UUID.sub("ID", text)).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def assert_golden(path: str | os.PathLike[str], text: str) -> None:
    """Compare `text` with the file; AssertionError shows the difference. Writes the file when asked to."""
    file = Path(path)
    if os.environ.get("STAGEFLOW_UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
        return
    if not file.exists():
        raise AssertionError(f"{file} does not exist yet; run with STAGEFLOW_UPDATE_GOLDEN=1 to write it")
    wanted = file.read_text(encoding="utf-8")
    if wanted == text:
        return
    difference = "".join(
        difflib.unified_diff(wanted.splitlines(True), text.splitlines(True), str(file), "what the test gave")
    )
    raise AssertionError(f"not as in {file.name} (STAGEFLOW_UPDATE_GOLDEN=1 writes it anew):\n{difference}")


def _still(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _still(one) for key, one in value.items() if key not in VOLATILE}
    if isinstance(value, list | tuple):
        return [_still(one) for one in value]
    if isinstance(value, str):
        return _UUID.sub("ID", value)
    return value
