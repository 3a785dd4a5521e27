"""The event envelope. Every event has the same ten fields; `data` holds what the catalogue lists for its type."""

from __future__ import annotations

from typing import Any

import msgspec


class Event(msgspec.Struct, frozen=True, gc=False):
    """One thing that happened. `seq` grows by one per event of an engine loop; `item` is an index path or None."""

    type: str
    time_unix_ns: int
    seq: int
    run_id: str | None = None
    stage: str | None = None
    item: tuple[int, ...] | None = None
    attempt: int | None = None
    lane: str | None = None
    data: dict[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        """Plain mapping with all nine keys."""
        return msgspec.structs.asdict(self)
