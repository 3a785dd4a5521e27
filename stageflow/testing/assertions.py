"""Assertions on one stage's output or on a whole run, with messages that show what was there.

    assert_output(result.outputs["parse"]).succeeded().has_value(3)
    assert_run(result).completed().stage("parse").contains("title")

Each returns the same object, so that they chain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from stageflow.core.kinds import StageStatus
from stageflow.core.output import StageOutput

__all__ = ["OutputAssertions", "RunAssertions", "assert_output", "assert_run"]

_MISSING: Any = object()
_LONGEST = 300


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def _shown(output: StageOutput) -> str:
    """An output in one line."""
    parts = [f"status={output.status}"]
    for name in ("error", "skip_reason", "cancel_reason"):
        if getattr(output, name) is not None:
            parts.append(f"{name}={getattr(output, name)!r}")
    if output.retryable:
        parts.append("retryable")
    if output.data is not None:
        parts.append(f"data={_short(output.data)}")
    if output.metadata:
        parts.append(f"metadata={_short(dict(output.metadata))}")
    info = output.error_info
    if info is not None and info.traceback:
        parts.append(f"traceback:\n{info.traceback}")
    return ", ".join(parts)


class OutputAssertions:
    """What one output must be."""

    def __init__(self, output: StageOutput, name: str = "the stage") -> None:
        self.output = output
        self.name = name

    def _expect(self, fine: bool, what: str) -> Self:
        if not fine:
            raise AssertionError(f"Expected {what} of {self.name}, got {_shown(self.output)}")
        return self

    def succeeded(self) -> Self:
        """OK or SKIP."""
        return self._expect(self.output.is_success, "success")

    def failed(self, containing: str | None = None) -> Self:
        """FAIL or CANCEL; with `containing`, its text has that in it."""
        self._expect(self.output.is_failure, "failure")
        text = self.output.error or self.output.cancel_reason or ""
        return self._expect(containing is None or containing in text, f"a failure that mentions {containing!r}")

    def status(self, status: StageStatus | str) -> Self:
        """Exactly this status."""
        return self._expect(self.output.status == StageStatus(status), f"status {StageStatus(status)}")

    def skipped(self, containing: str | None = None) -> Self:
        """SKIP; with `containing`, its reason has that in it."""
        self.status(StageStatus.SKIP)
        found = containing is None or containing in (self.output.skip_reason or "")
        return self._expect(found, f"a skip that mentions {containing!r}")

    def has_data(self) -> Self:
        """Data that is neither None nor empty."""
        data = self.output.data
        return self._expect(data is not None and (not hasattr(data, "__len__") or len(data) > 0), "data")

    def contains(self, key: str) -> Self:
        """A mapping with this key."""
        data = self.output.data
        return self._expect(isinstance(data, Mapping) and key in data, f"data with the key {key!r}")

    def value(self, key: str, expected: Any) -> Self:
        """A mapping whose `key` is `expected`."""
        self.contains(key)
        found = self.output.data[key]
        return self._expect(found == expected, f"{key!r} to be {_short(expected)} and not {_short(found)}")

    def has_value(self, expected: Any) -> Self:
        """Data equal to `expected`."""
        return self._expect(self.output.data == expected, f"the value {_short(expected)}")

    def metadata(self, key: str, expected: Any = _MISSING) -> Self:
        """Metadata with this key, and this value where one is given."""
        self._expect(key in self.output.metadata, f"metadata with the key {key!r}")
        if expected is _MISSING:
            return self
        return self._expect(self.output.metadata[key] == expected, f"metadata {key!r} to be {_short(expected)}")

    def retryable(self) -> Self:
        """The flag is set."""
        return self._expect(self.output.retryable, "a retryable output")

    def not_retryable(self) -> Self:
        """The flag is not set."""
        return self._expect(not self.output.retryable, "an output that is not retryable")


class RunAssertions:
    """What a RunResult must be."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def _expect(self, fine: bool, what: str) -> Self:
        if not fine:
            stages = ", ".join(f"{name}: {output.status}" for name, output in self.result.outputs.items())
            error = f", error={self.result.error!r}" if self.result.error else ""
            raise AssertionError(f"Expected {what}, got status={self.result.status}{error}; stages: {stages}")
        return self

    def completed(self) -> Self:
        """Nothing failed and nothing was cancelled."""
        return self._expect(self.result.status == "completed", "a completed run")

    def failed(self, containing: str | None = None) -> Self:
        """The run failed; with `containing`, its error has that in it."""
        self._expect(self.result.status == "failed", "a failed run")
        found = containing is None or containing in (self.result.error or "")
        return self._expect(found, f"an error that mentions {containing!r}")

    def cancelled(self, reason: str | None = None) -> Self:
        """The run was cancelled, for this reason where one is given."""
        self._expect(self.result.cancelled, "a cancelled run")
        return self._expect(reason is None or self.result.cancel_reason == reason, f"the reason {reason!r}")

    def stage(self, name: str) -> OutputAssertions:
        """Assertions on one stage's output."""
        output = self.result.outputs.get(name)
        self._expect(output is not None, f"an output of stage {name!r}")
        return OutputAssertions(output, f"stage {name!r}")

    def ran(self, *stages: str) -> Self:
        """These stages ended OK."""
        for name in stages:
            self.stage(name).status(StageStatus.OK)
        return self


def assert_output(output: StageOutput, name: str = "the stage") -> OutputAssertions:
    """Start a chain of assertions on an output."""
    return OutputAssertions(output, name)


def assert_run(result: Any) -> RunAssertions:
    """Start a chain of assertions on a run."""
    return RunAssertions(result)
