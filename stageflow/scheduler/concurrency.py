"""How many attempts the lanes of this process take at once: all they may, until it is measured that fewer do as well.

A pure function of what was measured. Nothing is lowered while nothing is strained, so a run begins with everything it
may have; under strain a lane is lowered step by step for as long as as much gets done, and raised again while that
brings more, or when the strain has gone.

May not import: asyncio, threading, time, random, logging, `stageflow.runtime`, any executor.
"""

from __future__ import annotations

from typing import Final

import msgspec

#: of what was done per second: less than this is a loss, more than the other a gain; between them is noise
LOSS: Final = 0.90
GAIN: Final = 1.05
#: looks that a step has to prove itself
PROOF: Final = 4
#: looks for which a size that was left as worse is not tried again
REST: Final = 40
LAG: Final = 0.1  # seconds by which the loop is late
THROTTLED: Final = 0.2  # share of the time in which the container's CPU quota held us
DESCRIPTORS: Final = 0.9  # share of the allowed descriptors that are open
#: cores that this process is busy on, between which its threads share one interpreter and more of them are of no use
ONE_INTERPRETER: Final = (0.85, 1.15)


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured since the last look."""

    done: float  #: attempts that ended, per second
    used: int  #: slots of the lane in use
    waiting: bool  #: somebody waits for a slot
    lag: float = 0.0  #: seconds by which the loop was late
    busy: float = 0.0  #: cores that this process kept busy
    throttled: float = 0.0  #: share of the time in which the CPU quota held us
    descriptors: float = 0.0  #: share of the allowed descriptors that are open


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """Where a lane stands. `before` is (slots, done per second) of the size that this one has to beat."""

    slots: int
    looks: int = 0
    done: float = 0.0  #: mean of the looks at this size
    before: tuple[int, float] | None = None
    resting: int = 0
    why: str = ""


def strain(lane: str, seen: Seen) -> str:
    """Why fewer at once might do as well; "" where nothing says so."""
    if seen.descriptors >= DESCRIPTORS:
        return f"{seen.descriptors:.0%} of the allowed descriptors are open"
    if seen.throttled >= THROTTLED:
        return f"the CPU quota held this process for {seen.throttled:.0%} of the time"
    if lane == "async" and seen.lag >= LAG:
        return f"the event loop was {seen.lag * 1000:.0f} ms late"
    if lane == "thread" and seen.used > 1 and ONE_INTERPRETER[0] <= seen.busy <= ONE_INTERPRETER[1]:
        return "the threads share one interpreter and keep it busy"
    return ""


def tune(lane: str, state: Tuning, seen: Seen, most: int) -> Tuning:
    """The next size of a lane of at most `most` slots."""
    least = min(2, most)
    why = strain(lane, seen)
    if seen.descriptors >= DESCRIPTORS and state.slots > least:  # the next one may fail: no time for proofs
        return Tuning(slots=max(least, min(state.slots, seen.used) // 2), why=why, resting=REST)
    if not seen.waiting or seen.used < state.slots:
        # the lane is not what holds things up: what is measured says nothing about its size
        if not why and state.slots < most:
            return Tuning(slots=min(most, state.slots * 2), resting=max(0, state.resting - 1))
        return msgspec.structs.replace(state, looks=0, done=0.0, resting=max(0, state.resting - 1))
    looks = state.looks + 1
    done = state.done + (seen.done - state.done) / looks
    resting = max(0, state.resting - 1)
    if looks < PROOF:
        return Tuning(slots=state.slots, looks=looks, done=done, before=state.before, resting=resting, why=state.why)
    if state.before is not None:
        slots, was = state.before
        lowered = slots > state.slots
        if done < was * LOSS or (not lowered and done < was * GAIN):
            # fewer did less, or more did no more: back, and no experiments for a while
            return Tuning(slots=slots, resting=REST, why=state.why if not lowered else "")
    if resting:
        return Tuning(slots=state.slots, resting=resting, why=state.why)
    if why and state.slots > least:
        return Tuning(slots=max(least, state.slots // 2), before=(state.slots, done), why=why)
    if not why and state.slots < most:
        return Tuning(slots=min(most, state.slots * 2), before=(state.slots, done), why=state.why)
    return Tuning(slots=state.slots, why=why)
