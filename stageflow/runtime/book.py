"""The values of one run: what each stage gave, encoded or not, until the result is dropped."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from stageflow.core.errors import InvariantError, NotShippableError
from stageflow.core.kinds import StageStatus
from stageflow.core.output import ErrorInfo, StageOutput
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.spec import Role
from stageflow.runtime.sequence import ItemSequence, Values

#: what a stage has that has not ended
NOTHING: Final = msgspec.UNSET
_OK: Final = StageOutput()


class Book:
    """Outputs by stage number. `values[i]` is the plain value, or an encoded one where `encoded[i]`."""

    __slots__ = ("encoded", "ends", "graph", "handles", "items", "kept", "outputs", "shared", "values")

    def __init__(self, graph: StageGraph) -> None:
        size = len(graph.specs)
        self.graph = graph
        self.values: list[Any] = [NOTHING] * size
        self.encoded = bytearray(size)
        self.outputs: dict[int, StageOutput] = {}  # what is more than a plain success; data apart
        self.shared: dict[int, Any] = {}  # values encoded once for several process stages
        self.handles: dict[int, Values] = {}
        self.kept: dict[int, ItemSequence] = {}
        self.items: dict[int, dict[str, int]] = {}  # counts of stream stages
        self.ends: dict[int, StageOutput] = {}  # SKIP, FAIL, CANCEL

    # ------------------------------------------------------------ writing

    def put(self, stage: int, value: Any, *, encoded: bool, meta: StageOutput | None) -> None:
        """A stage has succeeded. A re-run overwrites."""
        self.values[stage] = value
        self.encoded[stage] = encoded
        self.shared.pop(stage, None)
        if meta is not None:
            self.outputs[stage] = meta
        elif self.outputs:
            self.outputs.pop(stage, None)
        if self.ends:
            self.ends.pop(stage, None)

    def end(self, stage: int, output: StageOutput) -> None:
        """A stage has ended without success, or a stream stage has ended."""
        self.ends[stage] = output

    def hold(self, handle: int, values: Values) -> None:
        """A list of items under its handle."""
        self.handles[handle] = values

    def release(self, handle: int) -> None:
        """Nobody needs the list any more (kept items have their own reference)."""
        self.handles.pop(handle, None)

    def keep(self, stage: int, lo: int, count: int, at: int, handle: int) -> None:
        """Items that stay until the run ends."""
        sequence = self.kept.get(stage)
        if sequence is None:
            sequence = self.kept[stage] = ItemSequence()
        values = self.handles.get(handle)
        if values is None:
            raise InvariantError(f"items were kept of handle {handle}, which is not held")
        sequence.add(lo, count, at, values)

    # ------------------------------------------------------------ reading

    def value(self, stage: int) -> Any:
        """The plain value of a stage that succeeded; decoded once. Raises NotShippableError where that fails."""
        if self.graph.streams[stage]:
            return self.sequence(stage)
        value = self.values[stage]
        if self.encoded[stage]:
            try:
                value = value.load()
            except Exception as error:
                name = self.graph.specs[stage].name
                raise NotShippableError(
                    f"the value of stage {name!r} came from a worker and cannot be read in this process: "
                    f"{type(error).__name__}: {error}",
                    hint="see to it that what its class pickles as can be loaded anywhere, or run it on threads",
                    path=name,
                ) from error
            self.shared.setdefault(stage, self.values[stage])
            self.values[stage] = value
            self.encoded[stage] = 0
        return value

    def sequence(self, stage: int) -> ItemSequence:
        """The kept items of a stream."""
        found = self.kept.get(stage)
        if found is None:
            found = self.kept[stage] = ItemSequence()
        return found

    def has_output(self, stage: int) -> bool:
        """Whether the stage has ended."""
        return self.values[stage] is not NOTHING or stage in self.ends

    def output(self, stage: int) -> StageOutput | None:
        """The stage's StageOutput, or None while it has none."""
        end = self.ends.get(stage)
        if end is not None:
            if self.graph.streams[stage] and (end.status is StageStatus.OK or stage in self.kept):
                return self._of_stream(stage, end)  # also of a run that was stopped: what was done is kept
            return end
        if self.values[stage] is NOTHING:
            return None
        meta = self.outputs.get(stage)
        data = self.value(stage)
        if meta is None:
            return _OK if data is None else StageOutput(StageStatus.OK, data)
        return msgspec.structs.replace(meta, data=data)

    def _of_stream(self, stage: int, end: StageOutput) -> StageOutput:
        data = self.kept.get(stage) if self.keeps(stage) else None
        if data is None and self.keeps(stage):
            data = self.sequence(stage)
        return msgspec.structs.replace(end, data=data)

    def keeps(self, stage: int) -> bool:
        """Whether the stage's items are part of the result."""
        spec = self.graph.specs[stage]
        if spec.policies.keep is not None:
            return spec.policies.keep
        read = any(self.graph.reads(reader, stage) for reader in self.graph.dependents[stage])
        return spec.role != Role.SINK and not read

    def failure(self, stage: int, info: ErrorInfo, data: Any = None) -> None:
        """A stage has failed for good."""
        self.ends[stage] = StageOutput(
            StageStatus.FAIL, data, error=info.message, error_info=info, retryable=info.retryable
        )
