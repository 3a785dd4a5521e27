"""`ProcessPayload`: an encoded value the parent holds without decoding it, and the parent's memory as the codec sees
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from stageflow.core.errors import StageflowError
from stageflow_executors.processes.machine import usable_cores
from stageflow_executors.shm import codec, fidelity
from stageflow_executors.shm.copying import SHARED_ABOVE, copy_by_two
from stageflow_executors.shm.lease import Books, ValueReader

if TYPE_CHECKING:
    from stageflow_executors.processes.supply import WorkerSupply
    from stageflow_executors.shm.arena import Block


class ProcessPayload:
    """A value in encoded form. Holds a lease on each block it refers to until released or collected. Any thread."""

    __slots__ = ("__weakref__", "_blocks", "_books", "encoded", "inline", "nbytes", "released")

    def __init__(self, books: Books, encoded: Any, nbytes: int, blocks: tuple[codec.Key, ...], inline: int) -> None:
        """Takes over one lease on each of `blocks`."""
        self._books = books
        self.encoded = encoded
        self.nbytes = nbytes
        self.inline = inline
        self._blocks = blocks
        self.released = False

    @property
    def blocks(self) -> tuple[codec.Key, ...]:
        """The blocks it refers to; empty for a value that travels inline."""
        return self._blocks

    def load(self) -> Any:
        """The value. Large buffers are read-only views of the shared bytes, valid as long as they are referred to."""
        blocks = self._blocks
        if not blocks:
            if self.released and type(self.encoded) is list and codec.blocks_of(self.encoded):
                raise StageflowError("the payload was released; it cannot be loaded any more")
            return codec.decode(self.encoded, _no_memory)
        books = self._books
        books.lease(blocks)
        reader = ValueReader(books.mappings, books.dropped.append)
        try:
            return codec.decode(self.encoded, reader)
        finally:
            reader.finish(blocks)

    def release(self) -> None:
        """The value is not needed any more. Idempotent."""
        blocks, self._blocks = self._blocks, ()
        self.released = True
        if blocks:
            self._books.dropped.extend(blocks)

    def __del__(self) -> None:
        if self._blocks:
            self._books.dropped.extend(self._blocks)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a payload belongs to this process; pass it as an argument of a call, or pickle what load() returns"
        )

    def __repr__(self) -> str:
        where = f"{len(self._blocks)} shared blocks" if self._blocks else "inline"
        return f"<ProcessPayload {self.nbytes:,} bytes, {where}>"


class InlinePayload(msgspec.Struct, eq=False, weakref=True):
    """A value in encoded form that refers to no shared memory: nothing to lease, nothing to end."""

    encoded: Any
    nbytes: int

    @property
    def blocks(self) -> tuple[codec.Key, ...]:
        """None."""
        return ()

    @property
    def inline(self) -> int:
        """All of it."""
        return self.nbytes

    def load(self) -> Any:
        """The value."""
        encoded = self.encoded
        return encoded if type(encoded) is not list else codec.decode(encoded, _no_memory)

    def release(self) -> None:
        """Nothing to release."""

    def __reduce__(self) -> Any:
        raise TypeError(
            "a payload belongs to this process; pass it as an argument of a call, or pickle what load() returns"
        )

    def __repr__(self) -> str:
        return f"<ProcessPayload {self.nbytes:,} bytes, inline>"


class _NoMemory:
    """Reader of values that are inline throughout."""

    def peek(self, ref: codec.Ref) -> memoryview:
        raise StageflowError("the payload was released; it cannot be loaded any more")

    def view(self, ref: codec.Ref, *, writable: bool) -> memoryview:
        raise StageflowError("the payload was released; it cannot be loaded any more")


_no_memory = _NoMemory()


class ParentMemory:
    """The parent's arena as the codec sees it. Thread-safe."""

    def __init__(self, supply: WorkerSupply) -> None:
        self._supply = supply

    def allocate(self, nbytes: int) -> Block:
        """A block with one lease, which goes to the payload."""
        supply = self._supply
        supply.collect()
        block = supply.arena.allocate(nbytes)
        supply.books.lease((block.key,))
        return block

    def find(self, buffer: memoryview) -> tuple[codec.Key, int] | None:
        """Views of results are not recognised here: they are copied once more."""
        return None

    def copy(self, into: memoryview, data: Any) -> None:
        """By two threads where it is worth it and no worker wants the core."""
        if into.nbytes < SHARED_ABOVE or usable_cores() < 2 or self._supply.is_busy():
            into[:] = data
        else:
            copy_by_two(into, data)


def encode(supply: WorkerSupply, memory: ParentMemory, value: Any) -> ProcessPayload | InlinePayload:
    """`value` in the form in which several calls can share it. Raises NotShippableError or SharedMemoryFullError.
    Any thread.
    """
    encoded, nbytes, inline, blocks = encode_value(supply, memory, value)
    return ProcessPayload(supply.books, encoded, nbytes, blocks, inline) if blocks else InlinePayload(encoded, nbytes)


def encode_value(supply: WorkerSupply, memory: ParentMemory, value: Any) -> codec.Result:
    """`value` encoded, with one lease on each of its blocks. What it mentions of by-value modules gets shipped."""
    result = codec.encode(value, memory, supply.inline_threshold)
    encoded = result.encoded
    if fidelity.CHECK:
        try:
            fidelity.check(value, encoded, ValueReader(supply.books.mappings, lambda key: None))
        except BaseException:
            supply.books.dropped.extend(result.blocks)
            raise
    if type(encoded) is list and encoded[0] in _NAMING:
        data = encoded[2] if encoded[0] in (codec.STRUCT, codec.STRUCTS) else encoded[1]
        if type(data) is list:
            memory_of, _ = supply.books.mappings[data[0]].memory()
            mentioned = any(memory_of.find(name, data[2], data[2] + data[3]) >= 0 for name in supply.shipping.by_value)
        else:
            mentioned = any(name in data for name in supply.shipping.by_value)
        if mentioned:
            supply.shipping.learn(value)
    return result


_NAMING = frozenset((codec.PICKLE, codec.PICKLE_OOB, codec.STRUCT, codec.STRUCTS))
