"""Makes identifiers (UUID v4 and v7) and watches them: clock skew inside a v7, values that come twice.

Clocks and randomness are arguments; nothing here starts a thread or a task.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from stageflow.core.errors import DefinitionError

__all__ = [
    "ClockSkewDetector",
    "UuidCollisionMonitor",
    "UuidEvent",
    "UuidFactory",
    "generate_uuid",
    "generate_uuid4",
    "generate_uuid7",
    "uuid7_time_ms",
]

logger = logging.getLogger(__name__)

COUNTER_BITS: Final = 12
TIME_BITS: Final = 48


def wall_ms() -> int:
    """Milliseconds since 1970 by the wall clock."""
    return time.time_ns() // 1_000_000


class UuidFactory:
    """Makes version 7 UUIDs that sort in the order they were made, also inside one millisecond.

    The 12 bits after the time are a counter that starts at random in its lower half for every new millisecond; when it
    runs over, or the clock stands still or goes back, the time part moves one millisecond ahead of the clock instead.
    Thread-safe. Forked children stay unique because 62 bits are drawn from the operating system for every value.
    """

    def __init__(
        self,
        *,
        clock_ms: Callable[[], int] = wall_ms,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._clock_ms = clock_ms
        self._random_bytes = random_bytes
        self._lock = threading.Lock()
        self._last_ms = -1
        self._counter = 0

    def __call__(self) -> uuid.UUID:
        """Return the next UUID; greater than every earlier one of this factory."""
        noise = int.from_bytes(self._random_bytes(10), "big")
        with self._lock:
            now = self._clock_ms()
            if now > self._last_ms:
                self._last_ms = now
                self._counter = (noise >> 62) & 0x7FF
            else:
                self._counter += 1
                if self._counter >> COUNTER_BITS:
                    self._last_ms += 1
                    self._counter = 0
            value = (self._last_ms & ((1 << TIME_BITS) - 1)) << 80
            value |= 0x7 << 76 | self._counter << 64
        value |= 0b10 << 62 | (noise & ((1 << 62) - 1))
        return uuid.UUID(int=value)


_v7 = UuidFactory()


def generate_uuid4() -> uuid.UUID:
    """A random UUID."""
    return uuid.uuid4()


generate_uuid = generate_uuid4


def generate_uuid7() -> uuid.UUID:
    """A UUID that starts with the time in milliseconds; later ones of this process compare greater."""
    return _v7()


def uuid7_time_ms(value: uuid.UUID | str) -> int | None:
    """Milliseconds since 1970 that a version 7 UUID carries; None for any other version or text."""
    parsed = _as_uuid(value)
    if parsed is None or parsed.version != 7:
        return None
    return parsed.int >> 80


def _as_uuid(value: uuid.UUID | str) -> uuid.UUID | None:
    if isinstance(value, uuid.UUID):
        return value
    try:
        return uuid.UUID(value)
    except ValueError:
        return None


class ClockSkewDetector:
    """Compares the time inside version 7 UUIDs with this machine's clock."""

    def __init__(self, max_skew_ms: int = 5000, *, clock_ms: Callable[[], int] = wall_ms) -> None:
        if max_skew_ms < 0:
            raise DefinitionError(f"max_skew_ms must be 0 or more, not {max_skew_ms}", max_skew_ms=max_skew_ms)
        self.max_skew_ms = max_skew_ms
        self._clock_ms = clock_ms

    def check(self, value: uuid.UUID | str) -> int | None:
        """Absolute skew in milliseconds where it is above `max_skew_ms`; None otherwise and for other versions."""
        embedded = uuid7_time_ms(value)
        if embedded is None:
            return None
        skew = abs(self._clock_ms() - embedded)
        return skew if skew > self.max_skew_ms else None


@dataclass(frozen=True, slots=True, kw_only=True)
class UuidEvent:
    """One observed identifier. `observed_at` is in seconds of the monitor's clock; `skew_ms` only where too large."""

    value: str
    collision: bool
    category: str
    observed_at: float
    skew_ms: int | None = None


class UuidCollisionMonitor:
    """Tells whether an identifier was seen within the last `ttl_seconds`, in constant time per observation.

    Seeing a value again restarts its window. At most `max_entries` are remembered; the one seen longest ago goes first.
    Thread-safe: check and insert are one step. Listeners are called outside the lock, in the observing thread, and may
    observe in turn; what they raise is logged and swallowed.

    Raises:
        DefinitionError: `ttl_seconds` below 1 or `max_entries` below 1.
    """

    def __init__(
        self,
        ttl_seconds: float = 300.0,
        max_entries: int = 50_000,
        category: str = "uuid",
        *,
        skew: ClockSkewDetector | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not ttl_seconds >= 1:
            raise DefinitionError(f"ttl_seconds must be 1 or more, not {ttl_seconds}", ttl_seconds=ttl_seconds)
        if max_entries < 1:
            raise DefinitionError(f"max_entries must be 1 or more, not {max_entries}", max_entries=max_entries)
        self.ttl_seconds = ttl_seconds
        self.max_entries = max_entries
        self.category = category
        self._skew = skew
        self._clock = clock
        self._seen: OrderedDict[str, float] = OrderedDict()  # oldest sighting first
        self._listeners: list[Callable[[UuidEvent], None]] = []
        self._lock = threading.Lock()

    def add_listener(self, listener: Callable[[UuidEvent], None]) -> None:
        """Call `listener` with a `UuidEvent` after every observation from now on."""
        with self._lock:
            self._listeners.append(listener)

    def remove_listener(self, listener: Callable[[UuidEvent], None]) -> bool:
        """Stop calling `listener`; False where it was not registered."""
        with self._lock:
            if listener not in self._listeners:
                return False
            self._listeners.remove(listener)
            return True

    def observe(self, value: uuid.UUID | str) -> bool:
        """Remember one sighting; True where the same value was seen within the window."""
        key = str(value)
        skew_ms = self._skew.check(value) if self._skew is not None else None
        with self._lock:
            now = self._clock()
            self._drop_expired(now)
            collision = self._seen.pop(key, None) is not None
            while len(self._seen) >= self.max_entries:
                self._seen.popitem(last=False)
            self._seen[key] = now
            listeners = tuple(self._listeners)
        event = UuidEvent(value=key, collision=collision, category=self.category, observed_at=now, skew_ms=skew_ms)
        for listener in listeners:
            try:
                listener(event)
            except Exception:
                logger.exception("a listener of the %s monitor failed", self.category)
        return collision

    @property
    def window_size(self) -> int:
        """How many values are remembered and not expired."""
        with self._lock:
            self._drop_expired(self._clock())
            return len(self._seen)

    def clear(self) -> None:
        """Forget every value; listeners stay."""
        with self._lock:
            self._seen.clear()

    def _drop_expired(self, now: float) -> None:
        while self._seen:
            key, seen_at = next(iter(self._seen.items()))
            if now - seen_at < self.ttl_seconds:
                return
            del self._seen[key]
