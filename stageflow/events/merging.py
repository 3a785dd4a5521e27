"""`BlockMerger`: neighbouring blocks of items that end within milliseconds become one event, so that views cost per
time and not per item."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from stageflow.events.event import Event

#: A block after a quiet time is passed on at once; one that follows another within this is held for its neighbours.
QUIET_NS: Final = 10_000_000
#: No block is held longer than this, as long as anything happens; the fan-out's timer sees to it when nothing does.
HELD_NS: Final = 150_000_000

_Key = tuple[str | None, str | None, int | None]
_SUMS: Final = ("ok", "dropped", "failed", "seconds", "cpu_seconds", "bytes_in", "bytes_out", "queued_ms")


class BlockMerger:
    """Holds `stage.items` events and merges those of one stage and worker. Merged ones have the sums, `ranges` where
    the indices have gaps, the largest `max_seconds` and its block as `longest`, and the `seq` and time of the last.
    """

    __slots__ = ("_first_ns", "_last_ns", "holds")

    def __init__(self) -> None:
        #: the blocks that wait here
        self.holds: dict[_Key, list[Event]] = {}
        self._first_ns = 0
        self._last_ns = 0

    def add(self, event: Event) -> list[Event] | None:
        """Take a `stage.items` event: what is to be passed on now, or None when it is held."""
        now = event.time_unix_ns
        quiet = now - self._last_ns > QUIET_NS
        self._last_ns = now
        if not self.holds:
            if quiet:
                return [event]
            self._first_ns = now
        key = (event.run_id, event.stage, event.data.get("worker_pid"))
        held = self.holds.get(key)
        if held is None:
            self.holds[key] = [event]
        elif "items" not in event.data and "items" not in held[-1].data:
            held.append(event)
        else:
            # Its paths cannot be told as ranges: a group of its own, under a key nobody else has.
            self.holds[event.run_id, event.stage, -event.seq - 1] = held
            self.holds[key] = [event]
        return self.take() if now - self._first_ns > HELD_NS else None

    def take(self) -> list[Event]:
        """Everything that is held, merged, in order of `seq`."""
        groups, self.holds = self.holds, {}
        merged = [group[0] if len(group) == 1 else _merged(group) for group in groups.values()]
        merged.sort(key=_seq)
        return merged


def _seq(event: Event) -> int:
    return event.seq


def _merged(group: list[Event]) -> Event:
    first, last = group[0].data, group[-1]
    data: dict[str, Any] = {**first}
    ranges = _ranges(group)
    data["lo"], data["hi"] = ranges[0][0], ranges[-1][1]
    if len(ranges) > 1:  # several workers take turns at one stage
        data["ranges"] = ranges
    else:
        data.pop("ranges", None)
    sums = dict.fromkeys(_SUMS, 0)
    emitted, stopped, tells = 0, 0, False
    for event in group:
        get = event.data.get
        for name in _SUMS:
            value = get(name)
            if value:
                sums[name] += value
        stopped += get("cancelled") or 0
        left = get("emitted")
        tells = tells or left is not None
        emitted += (get("ok") or 0) if left is None else left
    data.update(sums)
    if stopped:
        data["cancelled"] = stopped
    if tells:
        data["emitted"] = emitted
    slowest = max(group, key=_seconds_of_longest).data
    data["max_seconds"] = _longest(slowest)
    data["longest"] = slowest.get("longest") or [slowest.get("lo"), slowest.get("hi")]
    starts = [event.data["started"] for event in group if event.data.get("started")]
    data["started"] = min(starts) if starts else 0.0
    return msgspec.structs.replace(last, data=data)


def _ranges(group: list[Event]) -> list[list[int]]:
    """The indices of all blocks, ascending, as ranges with gaps between them."""
    given = sorted(
        [lo, hi]
        for event in group
        for lo, hi in event.data.get("ranges") or [(event.data.get("lo") or 0, event.data.get("hi") or 0)]
    )
    ranges = [given[0]]
    for lo, hi in given[1:]:
        if lo == hi:
            continue  # of no item: it tells what came of others
        if lo <= ranges[-1][1]:
            ranges[-1][1] = max(ranges[-1][1], hi)
        else:
            ranges.append([lo, hi])
    return ranges


def _seconds_of_longest(event: Event) -> float:
    return _longest(event.data)


def _longest(data: dict[str, Any]) -> float:
    given = data.get("max_seconds")
    if given is not None:
        return float(given)
    count = (data.get("ok") or 0) + (data.get("dropped") or 0) + (data.get("failed") or 0)
    return float(data.get("seconds") or 0.0) / max(1, count)
