"""Undoes gzip and deflate without ever making more bytes than allowed. Pure; standard library only.

A "bomb" of 1,000:1 is stopped at the limit: `zlib` is asked for at most the bytes that are still wanted.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any, Protocol

from stageflow.websearch.errors import BadResponseError

ACCEPT_ENCODING = "gzip, deflate"
_MAX_LAYERS = 3  # "gzip, gzip, gzip, ..." in the header is an attack, not a need


class _Inflater(Protocol):
    def feed(self, data: bytes, limit: int) -> bytes: ...


class _Zlib:
    """One layer. Keeps what it was not allowed to decompress yet only until the next call; the caller stops at its
    limit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._machine: Any = zlib.decompressobj(zlib.MAX_WBITS | (16 if name == "gzip" else 0))
        self._fresh = True

    def feed(self, data: bytes, limit: int) -> bytes:
        """At most `limit` bytes of what `data` continues. Raises BadResponseError on broken data."""
        out: list[bytes] = []
        while data and limit > 0:
            if self._machine.eof:
                # gzip may hold several members; anything else after the end is padding
                if self._name != "gzip" or not data.startswith(b"\x1f\x8b"):
                    break
                self._machine = zlib.decompressobj(zlib.MAX_WBITS | 16)
            try:
                made = self._machine.decompress(data, limit)
            except zlib.error as error:
                if self._fresh and self._name == "deflate":
                    # "deflate" without the zlib header, as some servers send it
                    self._machine = zlib.decompressobj(-zlib.MAX_WBITS)
                    self._fresh = False
                    continue
                raise BadResponseError(f"broken {self._name} data: {error}", transient=False) from error
            self._fresh = False
            out.append(made)
            limit -= len(made)
            data = self._machine.unused_data if self._machine.eof else self._machine.unconsumed_tail
            if not made and not self._machine.eof:
                break
        return b"".join(out)


class BodyDecoder:
    """Collects a body from its chunks, decoded, up to `limit` bytes; `full` says that there was more.

    Raises:
        BadResponseError: the content coding is not one we accept, or the data is broken.
    """

    def __init__(self, content_encoding: str, *, limit: int) -> None:
        names = [name.strip().lower() for name in content_encoding.split(",")]
        names = [{"x-gzip": "gzip"}.get(name, name) for name in names if name and name != "identity"]
        unknown = [name for name in names if name not in {"gzip", "deflate"}]
        if unknown or len(names) > _MAX_LAYERS:
            raise BadResponseError(
                f"the response has content coding {content_encoding!r}, which was not asked for", transient=False
            )
        self._layers: list[_Inflater] = [_Zlib(name) for name in reversed(names)]
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0
        self.full = False

    def feed(self, chunk: bytes) -> bool:
        """Take one chunk; False when nothing more is wanted."""
        room = self._limit - self._size
        data = chunk
        # one byte more than there is room for tells a body of exactly the limit from one beyond it
        for layer in self._layers:
            data = layer.feed(data, room + 1)
        if len(data) > room:
            data = data[:room]
            self.full = True
        if data:
            self._parts.append(data)
            self._size += len(data)
        return not self.full

    def body(self) -> bytes:
        """Everything so far."""
        return b"".join(self._parts)


def decode_all(chunks: Iterable[bytes], content_encoding: str, *, limit: int) -> tuple[bytes, bool]:
    """The decoded body of `chunks` and whether it was cut off."""
    decoder = BodyDecoder(content_encoding, limit=limit)
    for chunk in chunks:
        if not decoder.feed(chunk):
            break
    return decoder.body(), decoder.full
