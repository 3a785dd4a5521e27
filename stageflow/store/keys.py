"""Keys and hashes that two different things never share.

Everything is fed to SHA-256 with a tag for its type and its length in front, so `["a:b", "c"]` and `["a", "b:c"]`, 1
and True, a list and a tuple all differ. Nothing depends on hash randomisation, memory addresses or a mapping's order.
"""

from __future__ import annotations

import copyreg
import enum
import struct
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

from stageflow.core.errors import NotShippableError

_LENGTH: Final = 32  # hexadecimal digits: 128 bits
PREFIX: Final = "idem:"


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...
    def digest(self) -> bytes: ...


def idempotency_key(parts: Iterable[Any]) -> str:
    """A key from its parts, in order: "idem:" and 32 hexadecimal digits."""
    return PREFIX + digest(tuple(parts))[:_LENGTH]


def hash_parameters(params: Any, fields: Iterable[str] | None = None) -> str:
    """The hash of a call's parameters, 32 hexadecimal digits.

    `fields` restricts a mapping, or an object with attributes, to those that exist; anything else is hashed whole.
    Takes any value that pickles. NotShippableError names the part that does not.
    """
    if fields is not None:
        names = sorted(set(fields))
        if isinstance(params, Mapping):
            params = {name: params[name] for name in names if name in params}
        elif any(hasattr(params, name) for name in names):
            params = {name: getattr(params, name) for name in names if hasattr(params, name)}
    return digest(params)[:_LENGTH]


def default_key(pipeline: str, stage: str, code_version: str, inputs_hash: str) -> str:
    """The key of a task without a key of its own: the same code of the same stage on the same inputs."""
    return idempotency_key((pipeline, stage, code_version, inputs_hash))


def digest(value: Any) -> str:
    """SHA-256 of a value's canonical form, 64 hexadecimal digits."""
    return _digest(value, [], "").hex()


def _digest(value: Any, above: list[int], path: str) -> bytes:
    import hashlib  # with OpenSSL behind it

    sha = hashlib.sha256()
    _feed(sha, value, above, path)
    return sha.digest()


def _tagged(sha: _Hash, tag: bytes, data: bytes | memoryview) -> None:
    size = data.nbytes if isinstance(data, memoryview) else len(data)
    sha.update(tag + struct.pack(">Q", size))
    sha.update(data)


def _text(sha: _Hash, tag: bytes, text: str) -> None:
    _tagged(sha, tag, text.encode("utf-8", "surrogatepass"))


def _feed(sha: _Hash, value: Any, above: list[int], path: str) -> None:
    kind = type(value)
    simple = _SIMPLE.get(kind)
    if simple is not None:
        simple(sha, value)
        return
    if id(value) in above:
        # A value inside itself is named by how far up it is.
        _tagged(sha, b"^", struct.pack(">Q", len(above) - above.index(id(value))))
        return
    above.append(id(value))
    try:
        if kind is list or kind is tuple:
            sha.update((b"l" if kind is list else b"t") + struct.pack(">Q", len(value)))
            for position, item in enumerate(value):
                _feed(sha, item, above, f"{path}[{position}]")
        elif kind is dict:
            _pairs(sha, b"d", value.items(), above, path)
        elif kind is set or kind is frozenset:
            sha.update((b"S" if kind is set else b"F") + struct.pack(">Q", len(value)))
            for item in sorted(_digest(item, above, f"{path}{{...}}") for item in value):
                sha.update(item)
        else:
            _object(sha, value, above, path)
    finally:
        above.pop()


def _pairs(sha: _Hash, tag: bytes, pairs: Iterable[tuple[Any, Any]], above: list[int], path: str) -> None:
    entries = sorted(
        (_digest(key, above, f"{path} key {key!r:.40}"), _digest(item, above, f"{path}[{key!r:.40}]"))
        for key, item in pairs
    )
    sha.update(tag + struct.pack(">Q", len(entries)))
    for key_hash, item_hash in entries:
        sha.update(key_hash + item_hash)


def _object(sha: _Hash, value: Any, above: list[int], path: str) -> None:
    if isinstance(value, type):
        _text(sha, b"c", name_of(value))
    elif isinstance(value, enum.Enum):
        _text(sha, b"e", name_of(type(value)) + "." + value.name)
    elif isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        _text(sha, b"p", name_of(value))
        if isinstance(value, types.FunctionType) and "<" in value.__qualname__:
            _tagged(sha, b"k", value.__code__.co_code)
    elif isinstance(value, types.ModuleType):
        _text(sha, b"m", value.__name__)
    elif isinstance(value, memoryview):
        _tagged(sha, b"v", value if value.c_contiguous else value.tobytes())
    elif type(value).__module__ == "numpy" and hasattr(value, "tobytes") and hasattr(value, "dtype"):
        _array(sha, value, above, path)
    else:
        _reduced(sha, value, above, path)


def _array(sha: _Hash, value: Any, above: list[int], path: str) -> None:
    _text(
        sha, b"a", f"{name_of(type(value))} {value.dtype.descr if value.dtype.names else value.dtype.str} {value.shape}"
    )
    if value.dtype.hasobject:
        _feed(sha, value.tolist(), above, path)
    else:
        _tagged(sha, b"b", value.tobytes())


def _reduced(sha: _Hash, value: Any, above: list[int], path: str) -> None:
    """Any other object: what pickle would be told about it, part by part, without pickle's memo and order."""
    reduce = copyreg.dispatch_table.get(type(value))
    try:
        told: Any = reduce(value) if reduce is not None else value.__reduce_ex__(4)
    except Exception as error:
        raise NotShippableError(
            f"a {name_of(type(value))} at {path or 'the top'} cannot be hashed: {error}",
            hint="choose the parameters that count with fields=, or give the idempotency a key",
            path=path or "$",
        ) from error
    _text(sha, b"o", name_of(type(value)))
    if isinstance(told, str):
        _text(sha, b"s", told)
        return
    parts = (*told, *(None,) * 6)[:6]
    _feed(sha, parts[0], above, path)
    _feed(sha, parts[1], above, path)
    state = parts[2]
    if isinstance(state, dict):
        _pairs(sha, b"d", state.items(), above, path)
    else:
        _feed(sha, state, above, path)
    _feed(sha, list(parts[3]) if parts[3] is not None else None, above, path)
    if parts[4] is not None:
        _pairs(sha, b"d", parts[4], above, path)


def name_of(value: Any) -> str:
    """Module and qualified name of a class or function."""
    return f"{getattr(value, '__module__', None) or ''}:{getattr(value, '__qualname__', None) or repr(value)}"


def _none(sha: _Hash, value: None) -> None:
    sha.update(b"N")


def _bool(sha: _Hash, value: bool) -> None:
    sha.update(b"T" if value else b"f")


def _int(sha: _Hash, value: int) -> None:
    _tagged(sha, b"i", value.to_bytes((value.bit_length() + 8) // 8, "big", signed=True))


def _float(sha: _Hash, value: float) -> None:
    # All NaNs are one value here, and 0.0 and -0.0 are two.
    sha.update(b"r" + (b"nan-----" if value != value else struct.pack(">d", value)))


def _str(sha: _Hash, value: str) -> None:
    _text(sha, b"s", value)


def _bytes(sha: _Hash, value: bytes) -> None:
    _tagged(sha, b"b", value)


def _bytearray(sha: _Hash, value: bytearray) -> None:
    _tagged(sha, b"B", bytes(value))


_SIMPLE: Final[dict[type, Callable[[_Hash, Any], None]]] = {
    type(None): _none,
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    bytes: _bytes,
    bytearray: _bytearray,
}
