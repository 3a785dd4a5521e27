"""Arrow values as one IPC stream in shared memory: written once, read where they lie.

A pickle would carry the whole of every buffer that a slice looks into, and a buffer of its own for each column of
each chunk. What an IPC stream would not bring back exactly (extension types, which the other side may not know, and
tables without columns) goes by pickle all the same.

Loaded only when a value's own type is pyarrow's, or has arrived as one. May import pyarrow and the standard library.
"""

from __future__ import annotations

from typing import Any, Final

import pyarrow as pa

TABLE, BATCH, ARRAY, CHUNKED = range(4)
_COLUMN: Final = "value"


class Stream:
    """A value ready to be written: how long it is, and what it was."""

    __slots__ = ("_batches", "_schema", "kind", "nbytes")

    def __init__(self, kind: int, schema: Any, batches: list[Any]) -> None:
        self.kind = kind
        self._schema = schema
        self._batches = batches
        counted = pa.MockOutputStream()  # counts what is written, and keeps nothing
        self._write(counted)
        self.nbytes: int = counted.size()

    def _write(self, sink: Any) -> None:
        with pa.ipc.new_stream(sink, self._schema) as writer:
            for batch in self._batches:
                writer.write_batch(batch)

    def write(self, room: memoryview) -> None:
        """Fill `room`, which has `nbytes`."""
        with pa.FixedSizeBufferWriter(pa.py_buffer(room)) as sink:
            self._write(sink)


def plan(value: Any) -> Stream | None:
    """How to write `value`; None if it is no Arrow data, or would not come back the same."""
    try:
        if isinstance(value, pa.Table):
            if _travels(value.schema) and value.num_columns:
                return Stream(TABLE, value.schema, value.to_batches())
        elif isinstance(value, pa.RecordBatch):
            if _travels(value.schema) and value.num_columns:
                return Stream(BATCH, value.schema, [value])
        elif isinstance(value, pa.Array):
            schema = pa.schema([pa.field(_COLUMN, value.type)])
            if _travels(schema):
                return Stream(ARRAY, schema, [pa.record_batch([value], schema=schema)])
        elif isinstance(value, pa.ChunkedArray):
            schema = pa.schema([pa.field(_COLUMN, value.type)])
            if _travels(schema):
                batches = [pa.record_batch([chunk], schema=schema) for chunk in value.chunks]
                return Stream(CHUNKED, schema, batches)
    except (pa.ArrowException, NotImplementedError, AttributeError):
        pass  # a layout that streams do not have
    return None


def _travels(schema: Any) -> bool:
    return all(_known(field.type) and not _is_extension(field) for field in schema)


def _is_extension(field: Any) -> bool:
    return field.metadata is not None and b"ARROW:extension:name" in field.metadata


def _known(kind: Any) -> bool:
    """Is `kind`, with all it is made of, one that every pyarrow knows?"""
    if isinstance(kind, pa.BaseExtensionType):
        return False
    if pa.types.is_dictionary(kind):
        return _known(kind.value_type)
    return all(_known(kind.field(at).type) and not _is_extension(kind.field(at)) for at in range(kind.num_fields))


def read(data: memoryview, kind: int) -> Any:
    """The value, whose buffers lie in `data` and keep it alive."""
    with pa.ipc.open_stream(pa.py_buffer(data)) as stream:
        if kind == TABLE:
            return stream.read_all()
        batches = list(stream)
        if kind == BATCH:
            return batches[0]
        if kind == ARRAY:
            return batches[0].column(0)
        return pa.chunked_array([batch.column(0) for batch in batches], type=stream.schema.field(0).type)
