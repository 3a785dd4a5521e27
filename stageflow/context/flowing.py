"""An item of a flat-map that gives more than may be held: its values leave in parts while its generator runs.

May import core, context, contracts and events only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, cast

from stageflow.context.parts import PART_BYTES
from stageflow.context.pieces import Done
from stageflow.context.sizes import sized
from stageflow.core.executor import Reply
from stageflow.core.kinds import DROP

if TYPE_CHECKING:
    from stageflow.context.stage_context import StageContext
    from stageflow.core.worker import PacedPort, TellingPort, WorkerPort

HELD_ITEMS: Final = 1_000  # an item that gives no more than this, and no more bytes, is held until its generator ends
HELD_BYTES: Final = 8 << 20
ASK_BYTES: Final = 1 << 20  # after so many bytes, or values, it is asked whether more is wanted
ASK_ITEMS: Final = 8 * HELD_ITEMS
FLOW_SECONDS: Final = 0.05  # values that flow are reported when this long has passed, however few they are
_STEP: Final = 64  # values between two looks at the clock and at what they weigh


class Flowing:
    """The generator of one item. `values` has what it gave and nobody was told of yet, `told` counts the others.
    After a while (`asks`) it stands still until its values are wanted.

    `skip` values are passed over first: an attempt before this one has told of them. `began`: seconds of the
    performance counter.
    """

    __slots__ = ("_given", "_iterator", "_skip", "_weighed", "asks", "began", "ctx", "port", "told", "values")

    def __init__(self, items: Any, ctx: StageContext | None, port: WorkerPort, skip: int) -> None:
        self._iterator: Any = aiter(items) if hasattr(items, "__aiter__") else iter(items)
        self._skip = skip
        self.began = time.perf_counter()
        self.ctx = ctx
        self.port = port
        self.told = skip
        self.values: list[Any] = []
        self.asks = False
        self._given = 0  # values and bytes since it last asked
        self._weighed = 0

    def hold(self) -> bool:
        """Gather what the generator gives until it ends; True when it has given more than may be held."""
        return self._gather(HELD_ITEMS, HELD_BYTES, 0.0)

    def more(self) -> bool:
        """Gather the next part; False when the generator has ended."""
        return self._gather(HELD_ITEMS, PART_BYTES, FLOW_SECONDS)

    def part(self, index: int, *, last: bool = False) -> Reply:
        """`values`, which are told of with that, as a part of the block: of the item `index`."""
        values, told = self.values, self.told
        self.values = []
        self.told += len(values)
        self._given += len(values)
        able = getattr(self.port, "stand", None) is not None or getattr(self.port, "tell", None) is not None
        self.asks = able and not last and (self._weighed >= ASK_BYTES or self._given >= ASK_ITEMS)
        done = Done((), counts=(len(values),), flows=((index, told),), asks=self.asks)
        return Reply(values, done, asks=self.asks)

    def stand(self) -> None:
        """Wait until more is wanted, or the item is to stop. What has asked does so before it goes on."""
        self.asks = False
        self._given = self._weighed = 0
        before = time.perf_counter()
        cast("PacedPort", self.port).stand(self.port.cancelled)
        self.began += time.perf_counter() - before  # that time is not the stage's

    async def tell(self, index: int, *, last: bool = False) -> None:
        """Deliver `part` from a coroutine, and wait behind it if it asks."""
        reply = self.part(index, last=last)
        before = time.perf_counter()
        try:
            await cast("TellingPort", self.port).tell(reply)
        finally:
            if self.asks:
                self._given = self._weighed = 0
                self.began += time.perf_counter() - before

    async def gather(self, most: int, most_bytes: int, seconds: float) -> bool:
        """`_gather` for a generator that may be async: one value after the other."""
        values, iterator = self.values, self._iterator
        weighed = each = 0
        until = time.perf_counter() + seconds if seconds else 0.0
        while True:
            try:
                value = await anext(iterator) if hasattr(iterator, "__anext__") else next(iterator)
            except (StopAsyncIteration, StopIteration):
                return False
            if value is DROP:
                continue
            if self._skip:
                self._skip -= 1
                continue
            values.append(value)
            given = len(values)
            if given < _STEP or not given % _STEP:  # the first are looked at, later ones now and then
                each = sized(value)
            weighed += each
            self._weighed += each
            if given >= most or weighed > most_bytes or (until and time.perf_counter() > until):
                return True

    async def aclose(self) -> None:
        """`close` for a generator that may be async."""
        if hasattr(self._iterator, "aclose"):
            await self._iterator.aclose()
        else:
            self.close()

    def check(self, check: Callable[[Any], None]) -> None:
        """Have every value looked at; the first that is refused and those behind it are not given."""
        for place, value in enumerate(self.values):
            try:
                check(value)
            except BaseException:
                del self.values[place:]
                raise

    def close(self) -> None:
        """Let the generator go."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()

    def _gather(self, most: int, most_bytes: int, seconds: float) -> bool:
        values = self.values
        weighed, step = 0, 1
        until = time.perf_counter() + seconds if seconds else 0.0
        while True:
            before = len(values)
            try:
                values.extend(islice(self._iterator, step))  # appends as it goes: of an exception too
            finally:
                given = len(values) - before
                each = sized(values[-1]) if given else 0
                self._sift(before)
            weighed += given * each
            self._weighed += given * each
            if given < step:
                return False
            if values and (len(values) >= most or weighed > most_bytes or (until and time.perf_counter() > until)):
                return True
            step = max(1, min(2 * step, _STEP, (most_bytes - weighed) // max(1, each)))

    def _sift(self, before: int) -> None:
        """Leave out what was dropped, and what is to be passed over."""
        values = self.values
        if any(value is DROP for value in islice(values, before, None)):
            values[before:] = [value for value in values[before:] if value is not DROP]
        if self._skip:
            passed = min(self._skip, len(values))
            del values[:passed]
            self._skip -= passed
