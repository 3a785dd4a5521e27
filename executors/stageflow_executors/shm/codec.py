"""The codec: values to and from a form that crosses a process boundary, exactly.

An encoded value is msgpack-able data: an exact scalar as itself, anything else as a list whose first element says
how to read the rest. Bytes are inline, or a reference `[segment, block, start, length]` into shared memory. Three
paths (first that fits): exact scalars; closed `msgspec.Struct` types, alone or in a list; pickle protocol 5 with
out-of-band buffers (cloudpickle where plain pickle cannot). Arrays, bytes, memoryviews and Arrow tables (`arrow`)
have a light way of their own. A value is the same whatever lane it crossed; the one permitted difference is that
arrays and memoryviews come back read-only.

May import `stageflow.core` and the standard library only; numpy and pyarrow are recognised without importing them,
cloudpickle is loaded on need.
"""

from __future__ import annotations

import pickle
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Final, Protocol

import msgspec

from stageflow.core.errors import NotShippableError
from stageflow_executors.shm import closed
from stageflow_executors.shm.arena import Block

if typing.TYPE_CHECKING:
    from stageflow_executors.shm import arrow

PICKLE, PICKLE_OOB, BYTES, STR, ARRAY, VIEW, BYTEARRAY, STRUCT, STRUCTS, ARROW, LAZY = range(11)
OOB_ABOVE: Final = 1024  #: smaller buffers stay in the pickle
_ALIGN: Final = 64
_I64: Final = 1 << 63

Ref = list[int]
Encoded = Any
Key = tuple[int, int]


class Memory(Protocol):
    """What encoding needs of shared memory."""

    def allocate(self, nbytes: int) -> Block: ...
    def find(self, buffer: memoryview) -> tuple[Key, int] | None:
        """(block, absolute start) if `buffer` already lies in shared memory that can be referred to."""
        ...

    def copy(self, into: memoryview, data: Any) -> None:
        """`into[:] = data`, both flat and of one size."""
        ...


class Reader(Protocol):
    """What decoding needs of shared memory. Every lease that `encoded` stands for is ended exactly once."""

    def peek(self, ref: Ref) -> memoryview:
        """The bytes, for use during decoding only."""
        ...

    def view(self, ref: Ref, *, writable: bool) -> memoryview:
        """The bytes, for as long as anything made from the view lives; takes over the block's lease."""
        ...


class Result(typing.NamedTuple):
    """`encoded`, how many bytes it stands for, how many of them are inline, and the blocks it refers to."""

    encoded: Encoded
    nbytes: int
    inline: int
    blocks: tuple[Key, ...]


_NO_BLOCKS: Final[tuple[Key, ...]] = ()
_SMALL: Final = frozenset((type(None), bool, float))


def encode(value: Any, memory: Memory, threshold: int) -> Result:
    """Encode `value`. Raises NotShippableError naming the path inside it, or SharedMemoryFullError."""
    kind = type(value)
    if kind in _SMALL:
        return Result(value, 8, 8, _NO_BLOCKS)
    if kind is _ndarray:
        name = _dtype_name(value.dtype)
        return _array(value, name, memory, threshold) if name else _pickled(value, memory, threshold)
    if kind is int:
        if -_I64 <= value < _I64:
            return Result(value, 8, 8, _NO_BLOCKS)
    elif kind is str:
        if len(value) <= threshold // 4:
            if value.isascii():
                return Result(value, len(value), len(value), _NO_BLOCKS)
            try:
                size = len(value.encode())
            except UnicodeEncodeError:
                return _pickled(value, memory, threshold)
            return Result(value, size, size, _NO_BLOCKS)
        try:
            return _laid(STR, value.encode(), memory, threshold)
        except UnicodeEncodeError:
            return _pickled(value, memory, threshold)
    elif kind is bytes:
        if len(value) < threshold:
            return Result(value, len(value), len(value), _NO_BLOCKS)
        return _laid(BYTES, value, memory, threshold)
    elif kind is bytearray:
        if len(value) >= OOB_ABOVE:
            return _laid(BYTEARRAY, value, memory, threshold)
    elif kind is memoryview:
        return _memoryview(value, memory, threshold)
    elif issubclass(kind, msgspec.Struct):
        if (data := closed.encode((value,), kind, value)) is not None:
            return _laid(STRUCT, data, memory, threshold, closed.name_of(kind))
    elif kind is list:
        if value and issubclass(first := type(value[0]), msgspec.Struct):
            if (data := closed.encode(value, first, value)) is not None:
                return _laid(STRUCTS, data, memory, threshold, closed.name_of(first))
    elif _ndarray is _Unknown and kind is getattr(sys.modules.get("numpy"), "ndarray", None):
        _meet_numpy()
        return encode(value, memory, threshold)
    elif kind.__module__ == "pyarrow.lib":
        from stageflow_executors.shm import arrow

        stream = arrow.plan(value)
        if stream is not None:
            return _streamed(stream, memory, threshold)
    return _pickled(value, memory, threshold)


def _laid(kind: int, data: Any, memory: Memory, threshold: int, *extra: Any) -> Result:
    """`data` inline or in a block of its own."""
    size = len(data)
    if size < threshold:
        return Result([kind, bytes(data) if kind == BYTEARRAY else data, *extra], size, size, _NO_BLOCKS)
    block = memory.allocate(size)
    memory.copy(block.view, data)
    return Result([kind, [*block.key, block.off, size], *extra], size, 64, (block.key,))


def _streamed(stream: arrow.Stream, memory: Memory, threshold: int) -> Result:
    """An Arrow value, written once: where its readers will map it."""
    size = stream.nbytes
    if size < threshold:
        data = bytearray(size)
        stream.write(memoryview(data))
        return Result([ARROW, bytes(data), stream.kind], size, size, _NO_BLOCKS)
    block = memory.allocate(size)
    stream.write(block.view)
    return Result([ARROW, [*block.key, block.off, size], stream.kind], size, 64, (block.key,))


def _buffer(data: memoryview, memory: Memory, threshold: int) -> tuple[Any, int, tuple[Key, ...]]:
    """A flat byte view as (inline bytes or reference, inline size, blocks)."""
    size = data.nbytes
    if size < threshold:
        return bytes(data), size, _NO_BLOCKS
    found = memory.find(data)
    if found is not None:
        key, start = found
        return [*key, start, size], 32, (key,)
    block = memory.allocate(size)
    memory.copy(block.view, data)
    return [*block.key, block.off, size], 32, (block.key,)


def _memoryview(value: memoryview, memory: Memory, threshold: int) -> Result:
    if value.nbytes == 0 or not value.c_contiguous:
        flat = memoryview(value.tobytes())
    else:
        flat = value.cast("B")
    data, inline, blocks = _buffer(flat, memory, threshold)
    return Result([VIEW, data, value.format, list(value.shape or ())], value.nbytes, inline, blocks)


def is_array(value: Any) -> bool:
    """Is it an array that takes the light path, as far as one can tell without looking at its type of numbers?"""
    return type(value) is _ndarray


class _Unknown:
    """Stands for numpy's array type until there is one."""


_ndarray: Any = _Unknown
_frombuffer: Any = None
_dtype_names: dict[Any, str] = {}
_dtypes: dict[str, Any] = {}


def _meet_numpy() -> None:
    global _ndarray, _frombuffer
    import numpy

    _ndarray, _frombuffer = numpy.ndarray, numpy.frombuffer


def _dtype_name(dtype: Any) -> str:
    """The text that numpy makes `dtype` from; "" for those that need a pickle: with objects, fields or notes."""
    name = _dtype_names.get(dtype)
    if name is None or dtype.metadata is not None:
        name = dtype.str
        if (
            dtype.hasobject
            or dtype.names
            or dtype.subdtype
            or dtype.metadata is not None
            or not _is_made_of(name, dtype)
        ):
            name = ""
        if len(_dtype_names) < 1000 and dtype.metadata is None:
            _dtype_names[dtype] = name
    return name


def _is_made_of(name: str, dtype: Any) -> bool:
    import numpy

    try:
        return bool(numpy.dtype(name) == dtype)
    except TypeError:
        return False


def _array(value: Any, dtype: str, memory: Memory, threshold: int) -> Result:
    nbytes = value.nbytes
    flags = value.flags
    order = "C"
    if not flags.c_contiguous:
        if flags.f_contiguous:
            order = "F"
        elif nbytes >= threshold:
            value = value.copy("C")
    if nbytes < threshold or not nbytes:
        data = value.tobytes(order)
        return Result([ARRAY, data, dtype, value.shape, order], nbytes, nbytes + 32, _NO_BLOCKS)
    import numpy

    flat = (value.T if order == "F" else value).reshape(-1).view(numpy.uint8)
    data, inline, blocks = _buffer(memoryview(flat), memory, threshold)
    return Result([ARRAY, data, dtype, value.shape, order], nbytes, inline + 32, blocks)


# ---------------------------------------------------------------- pickle


class _Chunks(list[Any]):
    """A file for a Pickler: large bytes objects arrive here without having been copied."""

    __slots__ = ()

    def write(self, data: Any) -> int:
        # A memoryview given by the pickler is only good during this call.
        self.append(data if type(data) is bytes else bytes(data))
        return len(data)


def _pickled(value: Any, memory: Memory, threshold: int) -> Result:
    chunks, buffers = dump(value)
    size = sum(map(len, chunks))
    if not buffers:
        if size < threshold:
            return Result([PICKLE, b"".join(chunks) if len(chunks) != 1 else chunks[0]], size, size, _NO_BLOCKS)
        block = memory.allocate(size)
        _fill(block, chunks)
        return Result([PICKLE, [*block.key, block.off, size]], size, 64, (block.key,))
    outside = sum(b.nbytes for b in buffers)
    if size + outside < threshold:
        return Result(
            [PICKLE_OOB, b"".join(chunks), [bytes(b) for b in buffers]], size + outside, size + outside, _NO_BLOCKS
        )
    return _laid_out_of_band(chunks, size, buffers, outside, memory)


def _laid_out_of_band(
    chunks: list[bytes], size: int, buffers: list[memoryview], outside: int, memory: Memory
) -> Result:
    """The buffers, and the pickle if it is large too, side by side in one block; buffers that are already shared
    stay."""
    blocks: list[Key] = []
    refs: list[Any] = []
    fresh: list[tuple[int, memoryview]] = []
    room = size if size >= 16384 else 0
    for index, buffer in enumerate(buffers):
        found = memory.find(buffer)
        if found is not None:
            refs.append([*found[0], found[1], buffer.nbytes])
            if found[0] not in blocks:
                blocks.append(found[0])
        else:
            refs.append(None)
            room = -(-room // _ALIGN) * _ALIGN + buffer.nbytes
            fresh.append((index, buffer))
    head: Any = b"".join(chunks) if size < 16384 else None
    if room:
        block = memory.allocate(room)
        blocks.append(block.key)
        at = 0
        if head is None:
            _fill(block, chunks)
            head = [*block.key, block.off, size]
            at = size
        for index, buffer in fresh:
            at = -(-at // _ALIGN) * _ALIGN
            memory.copy(block.view[at : at + buffer.nbytes], buffer)
            refs[index] = [*block.key, block.off + at, buffer.nbytes]
            at += buffer.nbytes
    inline = (len(head) if type(head) is bytes else 32) + 32 * len(refs)
    return Result([PICKLE_OOB, head, refs], size + outside, inline, tuple(blocks))


def _fill(block: Block, chunks: Sequence[bytes]) -> None:
    at = 0
    for chunk in chunks:
        block.view[at : at + len(chunk)] = chunk
        at += len(chunk)


def dump(value: Any) -> tuple[list[bytes], list[memoryview]]:
    """`value` as pickle 5: its chunks, and flat views of its out-of-band buffers. Raises NotShippableError."""
    buffers: list[memoryview] = []

    def out_of_band(buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:
            return True  # not contiguous: pickle copies it in-band
        if raw.nbytes < OOB_ABOVE:
            return True
        buffers.append(raw)
        return False

    chunks = _Chunks()
    try:
        pickle.Pickler(chunks, 5, buffer_callback=out_of_band).dump(value)
        return chunks, buffers
    except Exception as first:
        chunks.clear()
        buffers.clear()
        try:
            import cloudpickle

            cloudpickle.Pickler(chunks, 5, buffer_callback=out_of_band).dump(value)
            return chunks, buffers
        except Exception as error:
            path, culprit = find_culprit(value)
            raise NotShippableError(
                f"{path} cannot cross to another process: {type(culprit).__name__}: {error}"[:2000],
                hint="hand over the data it was made from instead, or run the stage with executor='thread'",
                path=path,
            ) from first


def find_culprit(value: Any, name: str = "value") -> tuple[str, Any]:
    """(path, object) of the innermost part of `value` that does not pickle. Bounded in depth and breadth; never
    raises."""
    for _ in range(50):
        for step, part in _parts(value):
            if not _pickles(part):
                name, value = name + step, part
                break
        else:
            return name, value
    return name, value


def _pickles(value: Any) -> bool:
    try:
        pickle.dumps(value, 5)
    except Exception:
        try:
            import cloudpickle

            cloudpickle.dumps(value, 5)
        except Exception:
            return False
    return True


def _parts(value: Any) -> list[tuple[str, Any]]:
    try:
        if isinstance(value, dict):
            return [(f"[{key!r:.80}]", part) for key, part in list(value.items())[:10000]] + [
                (f".keys()[{key!r:.80}]", key) for key in list(value)[:10000]
            ]
        if isinstance(value, list | tuple):
            return [(f"[{index}]", part) for index, part in enumerate(value[:10000])]
        if isinstance(value, set | frozenset):
            return [("{...}", part) for part in list(value)[:10000]]
        if isinstance(value, types.FunctionType):
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=False)
            found = [(f".<closure {name}>", cell.cell_contents) for name, cell in cells]
            names = [n for n in value.__code__.co_names if n in value.__globals__]
            return found + [(f".<global {name}>", value.__globals__[name]) for name in names]
        if isinstance(value, types.MethodType):
            return [(".__self__", value.__self__)]
        if isinstance(value, msgspec.Struct):
            return [(f".{name}", getattr(value, name)) for name in value.__struct_fields__]
        state = dict(getattr(value, "__dict__", {}))
        for cls in type(value).__mro__:
            for slot in cls.__dict__.get("__slots__", ()):
                if hasattr(value, slot) and slot != "__weakref__":
                    state.setdefault(slot, getattr(value, slot))
        return [(f".{key}", part) for key, part in state.items()]
    except Exception:
        return []


# ---------------------------------------------------------------- decode


def decode(encoded: Encoded, reader: Any, writable: bool = False) -> Any:
    """The value again. Raises whatever its classes raise."""
    if type(encoded) is not list:
        return encoded
    kind, data = encoded[0], encoded[1]
    if kind == PICKLE:
        return pickle.loads(data if type(data) is bytes else reader.peek(data))
    if kind == ARRAY:
        return _load_array(encoded, reader, writable)
    if kind == PICKLE_OOB:
        buffers: list[Any] = []
        for part in encoded[2]:
            if type(part) is bytes:
                buffers.append(bytearray(part) if writable else part)
            else:
                buffers.append(reader.view(part, writable=writable))
        return pickle.loads(data if type(data) is bytes else reader.peek(data), buffers=buffers)
    if kind == ARROW:
        from stageflow_executors.shm import arrow

        if type(data) is list:
            return arrow.read(reader.view(data, writable=writable), encoded[2])
        return arrow.read(memoryview(bytearray(data) if writable else data), encoded[2])
    if kind == VIEW:
        view = (
            reader.view(data, writable=writable)
            if type(data) is list
            else memoryview(bytearray(data) if writable else data)
        )
        shape = encoded[3]
        if view.nbytes == 0:
            return view.cast(encoded[2]) if len(shape) == 1 else view
        if len(shape) == 1:
            return view if encoded[2] == "B" else view.cast(encoded[2])
        return view.cast(encoded[2], shape)
    if type(data) is list:
        data = reader.peek(data)
    if kind == BYTES:
        return bytes(data)
    if kind == STR:
        return str(data, "utf-8")
    if kind == BYTEARRAY:
        return bytearray(data)
    return closed.decode(data, encoded[2], many=kind == STRUCTS)


def _load_array(encoded: Encoded, reader: Reader, writable: bool) -> Any:
    if _frombuffer is None:
        _meet_numpy()
    _, data, name, shape, order = encoded
    dtype = _dtypes.get(name)
    if dtype is None:
        import numpy

        dtype = _dtypes[name] = numpy.dtype(name)
    if type(data) is list:
        return _ndarray(shape, dtype, reader.view(data, writable=writable), order=order)
    if writable or not data:
        return _ndarray(shape, dtype, bytearray(data), order=order)
    if len(shape) == 1:
        return _frombuffer(data, dtype)
    return _ndarray(shape, dtype, data, order=order)


def blocks_of(encoded: Encoded) -> tuple[Key, ...]:
    """The blocks that `encoded` refers to, each once."""
    if type(encoded) is not list:
        return _NO_BLOCKS
    if encoded[0] == LAZY:
        return blocks_of(encoded[1])
    found: list[Key] = []
    parts = [encoded[1], *encoded[2]] if encoded[0] == PICKLE_OOB else [encoded[1]]
    for part in parts:
        if type(part) is list and (key := (part[0], part[1])) not in found:
            found.append(key)
    return tuple(found)


def any_shared(values: Iterable[Encoded]) -> bool:
    """May any of them refer to shared memory, or be decoded later? The others decode at once without a reader."""
    return any(type(one) is list and (type(one[1]) is list or one[0] in (PICKLE_OOB, LAZY)) for one in values)
