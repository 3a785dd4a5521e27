"""An event as one line of JSON, and as the text that stands for what JSON cannot hold."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from stageflow.events.event import Event


def encode_json(event: Event) -> bytes:
    """One JSON object with sorted keys and no newline. Values JSON cannot hold become their text, never an error."""
    try:
        return _ENCODER.encode(event)
    except Exception:
        return _ENCODER.encode(msgspec.structs.replace(event, data=plain(event.data)))


def decode_json(line: bytes | str) -> Event:
    """The inverse of `encode_json` (what was turned into text stays text)."""
    return _DECODER.decode(line)


def plain(value: Any, depth: int = 8) -> Any:
    """`value` with everything that JSON cannot hold replaced by its text; never raises, cuts below `depth` levels."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else as_text(value)
    if depth > 0:
        if isinstance(value, dict):
            return {as_text(key): plain(entry, depth - 1) for key, entry in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [plain(entry, depth - 1) for entry in value]
    return as_text(value)


def as_text(value: Any) -> str:
    """`str(value)`, or what stands for it where that raises. Surrogates are escaped so that the text can be written."""
    try:
        return str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    except Exception as error:
        return f"<{type(value).__name__}: str() raised {type(error).__name__}>"


_ENCODER: Final = msgspec.json.Encoder(order="sorted", enc_hook=as_text)
_DECODER: Final = msgspec.json.Decoder(Event)
