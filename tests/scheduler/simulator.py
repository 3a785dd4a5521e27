"""A driver without loop or lanes: performs actions of a machine on sketched pipelines, in an order dice decide.

The runners are really called; when an attempt ends, how much of a block comes back, when workers die, what attempts
start as child runs, which signals come in one turn and when timers fire is chosen at random. After each turn, or after
some of them, the books are audited; a fault that was seen late is looked for again with an audit after every turn.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field

import msgspec

from stageflow.context.pieces import Done, ItemFailure, mask_of, ranges_without
from stageflow.core.errors import InvariantError
from stageflow.core.kinds import DROP
from stageflow.core.output import ErrorInfo, StageOutput
from stageflow.pipeline import policies
from stageflow.pipeline.regions import find_regions
from stageflow.pipeline.spec import Role
from stageflow.scheduler import actions as act
from stageflow.scheduler import signals as sig
from stageflow.scheduler.audit import audit
from stageflow.scheduler.layout import Layout
from stageflow.scheduler.machine import Machine
from stageflow.scheduler.states import StageState
from stageflow.testing.sketches import (
    Fate,
    FlatRunner,
    GraphSketch,
    HangError,
    Reference,
    Runner,
    SourceRunner,
    StageSketch,
)

ACTIONS = (
    act.StartAttempt, act.StartBlock, act.StartFold, act.StopAttempt, act.Stand, act.GoOn,
    act.SetTimer, act.CancelTimer, act.PullSource,
    act.StopSource, act.Spill, act.Decide, act.Release, act.Emit, act.Completed, act.KeepItems, act.KeepAccumulator,
    act.FinishRun,
)  # fmt: skip
SIZE = 10  # bytes of every list of values
DEEPEST = 3  # levels of child runs


class Ctx:
    __slots__ = ("attempt", "feedback")

    def __init__(self, attempt, feedback=None):
        self.attempt = attempt
        self.feedback = feedback


@dataclass(slots=True)
class Plan:
    """A sketch with all that is worked out once, however many simulations run it."""

    sketch: GraphSketch
    layout: Layout = None
    wanted: Reference = None
    #: stages of which it depends on the order of things how far they come: behind a stream that breaks
    loose: frozenset[str] = field(default_factory=frozenset)

    def __post_init__(self):
        sketch = self.sketch
        graph, lanes = sketch.build(), [stage.lane for stage in sketch.stages]
        self.layout = Layout(graph, lanes, regions=find_regions(graph, lanes))
        self.wanted = sketch.reference()
        if self.wanted.states:
            self.loose = frozenset(one.name for one in sketch.stages if self.tainted(one.name))

    def tainted(self, name):
        """Whether a stream that failed lies above."""
        by_name = {stage.name: stage for stage in self.sketch.stages}
        todo, seen = [name], set()
        while todo:
            one = by_name[todo.pop()]
            if one.name in seen:
                continue
            seen.add(one.name)
            if self.wanted.states[one.name] == "fail" and one.role in ("source", "map", "flat", "batch", "sink"):
                return True
            when = one.policies.get("when")
            above = (one.over, one.joined, *one.reads, *one.after, when[0] if when else None)
            todo.extend(other for other in above if other is not None)
        return False


class Under:
    """An attempt under way."""

    __slots__ = (
        "accumulators", "action", "asks", "at", "children", "doomed", "hung", "pieces", "since", "spawned", "stopped",
        "told",
    )  # fmt: skip

    def __init__(self, action, now):
        self.action = action
        self.since = now
        self.stopped = False
        self.hung = False
        self.asks = False  # it stands still until it is told to go on
        self.children = []  # runs it waits for
        self.spawned = False
        self.doomed = set()  # items of its block that were asked to stop
        self.at = 0  # items of its block that have been reported
        self.told = {}  # of a flat-map: items of which some values have been reported, and how many
        self.pieces = []
        self.accumulators = []

    def may_end(self):
        return not self.children and (self.stopped or not (self.hung or (self.asks and not self.doomed)))


class Simulation:
    """One machine and the runs submitted to it."""

    def __init__(
        self,
        dice,
        *,
        lanes=None,
        deaths=0.0,
        cancel=0.0,
        memory=0,
        poison_limit=1000,
        audits=1.0,
        ahead=None,
        stops=0.0,
        children=(),
        crowds=0.0,
    ):
        self.dice = dice
        self.roll = dice.random
        self.made_of = {
            "lanes": lanes or {"process": 2, "thread": 3, "async": 5, "inline": 1},
            "tokens": {"gpu": 2},
            "memory": memory,
            "poison_limit": poison_limit,
            "ahead": ahead or {"process": 2},
        }
        self.machine = Machine(**self.made_of)
        self.deaths = deaths
        self.cancel_share = cancel
        self.stop_share = stops  # of steps at which one item is stopped
        self.stopped = []  # (run, stage, index) of items that ended so
        self.audits = audits  # share of turns with one
        self.plans = children  # what attempts may start as child runs
        self.crowds = crowds  # share of turns in which several things have happened
        self.waiting = None  # signals of such a turn, until it is complete
        self.came_back = []  # attempts of which a child run has finished
        self.told_to_stop = []  # child runs of attempts that are to stop
        self.parents = {}  # child run -> attempt that waits for it
        self.depth = {}
        self.disturbed = set()  # runs that were stopped, or an item of them: how they end depends on when
        self.now = 100.0
        self.log = []
        self.actions = []
        self.steps = 0
        self.under = {}
        self.timers = {}
        self.pulls = {}  # (run, stage) -> items asked for
        self.sources = {}
        self.deciding = []
        self.spills = []
        self.values = {}  # (run, handle) -> list
        self.outputs = {}  # (run, stage) -> value
        self.kept = {}  # (run, stage) -> [(lo, values)]
        self.finished = {}
        self.failed_items = Counter()
        self.totals = {}  # (run, stage) -> what the last word of a stream said
        self.started = Counter()
        self.layouts = {}
        self.sketches = {}
        self.of = {}  # run -> its plan
        self.live = []  # runs that have not finished
        self.stood = 0  # times that a flat-map's call stood still
        self.flowed = 0  # values of flat-maps that were reported before their item had ended
        self.calls = Counter()  # (run, stage, value) -> calls of its runner
        self._handle = 0
        self._do = {kind: getattr(self, "do_" + kind.__name__) for kind in ACTIONS}

    # ------------------------------------------------------------ in and out

    def submit(self, what: GraphSketch | Plan, *, deadline=None, parent=0):
        plan = what if isinstance(what, Plan) else Plan(what)
        run = len(self.layouts) + 1
        self.of[run] = plan
        self.layouts[run] = plan.layout
        self.sketches[run] = plan.sketch
        self.depth[run] = 0
        self.live.append(run)
        if parent:
            under = self.under[parent]
            self.depth[run] = self.depth[under.action.run] + 1
            under.children.append(run)
            self.parents[run] = parent
        self.send(sig.RunSubmitted(run, f"run-{run}", plan.layout, plan.sketch.mode, deadline, True, parent))
        return run

    def send(self, *signals):
        if self.waiting is not None:
            self.waiting.extend(signals)
        else:
            self.turn(list(signals))

    def turn(self, signals):
        """Tell the machine all of it at once, and do what it says."""
        self.steps += len(signals)
        self.log.append((self.now, signals))
        actions = self.machine.handle_all(signals, self.now)
        self.actions.extend(actions)
        does = self._do
        for action in actions:
            does[type(action)](action)
        if self.audits and (self.audits >= 1 or self.roll() < self.audits):
            audit(self.machine)
        if self.came_back:
            back, self.came_back = self.came_back, []
            self.turn([sig.ChildrenWait(task, False) for task in back if task in self.under])
        if self.told_to_stop:
            stop, self.told_to_stop = self.told_to_stop, []
            for run in stop:
                if run not in self.finished:
                    self.cancel(run)

    def below(self, limit):
        """A number in [0, limit). `randint` costs four times as much."""
        return int(self.roll() * limit)

    def run(self, most=20_000):
        """Until every run is over and everything has been found as it should be."""
        with self.explained():
            while self.live:
                assert self.steps < most, "the simulation does not end"
                self.step()
            audit(self.machine)
            self.check_clean()
        return self

    @contextlib.contextmanager
    def explained(self):
        """Where not every turn was audited, tell of a fault by the first turn after which the books are wrong."""
        try:
            yield
        except (AssertionError, InvariantError) as seen:
            if self.audits < 1:
                machine = Machine(**self.made_of)
                for turn, (now, signals) in enumerate(self.log):
                    machine.handle_all(signals, now)
                    try:
                        audit(machine)
                    except InvariantError as first:
                        first.add_note(f"after turn {turn} of {len(self.log)}: {signals}")
                        raise first from seen
            raise

    def step(self):
        if self.crowds and self.roll() < self.crowds:
            self.waiting = []
            for _ in range(2 + self.below(4)):
                if not self.happens():
                    break
            signals, self.waiting = self.waiting, None
            if signals:
                self.turn(signals)
        elif not self.happens():
            hung = [task for task, under in self.under.items() if under.hung]
            raise AssertionError(f"nothing can happen any more; hung: {hung}, finished: {self.finished}")

    def happens(self):
        """One thing, as the dice say; False when nothing can."""
        ends = [task for task, under in self.under.items() if under.may_end()]
        pulls, deciding, spills = len(self.pulls), len(self.deciding), len(self.spills)
        choices = len(ends) + pulls + deciding + spills
        if self.timers and (not choices or self.roll() < 0.1):
            timers = self.timers
            self.timer(min(timers, key=timers.__getitem__))
            return True
        if not choices:
            return False
        if self.cancel_share and self.roll() < self.cancel_share:
            self.cancel(self.live[self.below(len(self.live))])
            return True
        if self.stop_share and self.roll() < self.stop_share and self.stop_item():
            return True
        if self.roll() < 0.005:
            self.send(sig.PressureChanged(self.below(4), "test"))
            return True
        self.now += self.below(4) / 1000
        choice = self.below(choices)
        if choice < len(ends):
            self.end(ends[choice])
        elif (choice := choice - len(ends)) < pulls:
            self.pull(list(self.pulls)[choice])
        elif (choice := choice - pulls) < deciding:
            self.decide(self.deciding[choice])
        else:
            self.spilled(self.spills[choice - deciding])
        return True

    def cancel(self, run):
        """As the driver does: the runs below are stopped as well."""
        self.disturbed.add(run)
        self.send(sig.CancelRequested(run, "by the test"))
        for child, parent in list(self.parents.items()):
            if parent in self.under and self.under[parent].action.run == run:
                self.cancel(child)

    def spawn(self, task):
        """The attempt starts a child run and waits for it."""
        self.send(sig.ChildrenWait(task, True))
        self.submit(self.plans[self.below(len(self.plans))], parent=task)

    def stop_item(self):
        """Ask for one item of some map or sink to stop, whether it is there or not."""
        run = self.live[self.below(len(self.live))]
        roles = self.layouts[run].roles
        stages = [stage for stage in range(len(roles)) if roles[stage] in (Role.MAP, Role.SINK)]
        if not stages:
            return False
        stage = stages[self.below(len(stages))]
        self.disturbed.add(run)
        self.send(sig.StopItem(run, stage, self.below(41), "by the test"))
        return True

    def chance(self, share):
        return share > 0 and self.roll() < share

    # ------------------------------------------------------------ what is done

    def do_StartAttempt(self, action):
        self.start(action)

    def do_StartBlock(self, action):
        self.start(action)

    def do_StartFold(self, action):
        self.start(action)
        for handle in action.accumulators:
            assert handle == 0 or (action.run, handle) in self.values, "a fold reads a value that was released"

    def start(self, action):
        assert action.task not in self.started, "a task is started once"
        self.started[action.task] += 1
        assert action.run not in self.finished, "nothing starts after the end"
        under = self.under[action.task] = Under(action, self.now)
        if not isinstance(action, act.StartAttempt):
            under.pieces = self.block_items(action)  # a call holds its arguments, whatever is released meanwhile
        if isinstance(action, act.StartFold):
            under.accumulators = [self.values[action.run, handle][0] for handle in action.accumulators if handle]

    def do_StopAttempt(self, action):
        if action.task in self.under and action.item >= 0:
            self.under[action.task].doomed.add(action.item)
        elif action.task in self.under:
            under = self.under[action.task]
            under.stopped = True
            self.told_to_stop.extend(under.children)

    def do_Stand(self, action):
        assert self.under[action.task].asks, "only who asks is made to stand"
        self.stood += 1

    def do_GoOn(self, action):
        if action.task in self.under:
            self.under[action.task].asks = False

    def do_SetTimer(self, action):
        assert action.timer not in self.timers
        self.timers[action.timer] = (action.at, action.task)

    def do_CancelTimer(self, action):
        self.timers.pop(action.timer, None)

    def do_PullSource(self, action):
        assert (action.run, action.stage) not in self.pulls, "one pull at a time"
        self.pulls[action.run, action.stage] = action.count

    def do_StopSource(self, action):
        self.pulls[action.run, action.stage] = -1

    def do_Spill(self, action):
        assert (action.run, action.handle) in self.values, "only what is held goes to disk"
        self.spills.append((action.run, action.stage, action.handle))

    def do_Decide(self, action):
        self.deciding.append((action.run, action.stage))

    def do_Release(self, action):
        for handle in action.handles:
            assert (action.run, handle) in self.values, "a value is released once"
            del self.values[action.run, handle]

    def do_Emit(self, action):
        assert action.run not in self.finished
        if action.type == "stage.failed" and action.item is not None:
            self.failed_items[action.run, action.stage] += 1
        if action.type == "stage.cancelled" and action.item is not None:
            one = (action.run, action.stage, action.item[0])
            assert one not in self.stopped, "an item ends once"
            self.stopped.append(one)
        if action.type == "stage.completed" and "items_in" in action.data:
            self.totals[action.run, action.stage] = action.data

    def do_Completed(self, action):
        assert action.run not in self.finished
        assert action.rows

    def do_KeepItems(self, action):
        values = self.values[action.run, action.handle]
        count = action.hi - action.lo if action.mask < 0 else action.mask.bit_count()
        kept = self.kept.setdefault((action.run, action.stage), [])
        kept.append((action.lo, values[action.at : action.at + count]))

    def do_KeepAccumulator(self, action):
        spec = self.layouts[action.run].specs[action.stage]
        value = self.values[action.run, action.handle][0] if action.handle else spec.reduce.initial
        self.outputs[action.run, action.stage] = value

    def do_FinishRun(self, action):
        assert action.run not in self.finished, "a run is finished once"
        assert not [u for u in self.under.values() if u.action.run == action.run], "finished with something running"
        self.finished[action.run] = action
        self.values = {key: value for key, value in self.values.items() if key[0] != action.run}
        self.pulls = {key: value for key, value in self.pulls.items() if key[0] != action.run}
        self.deciding = [one for one in self.deciding if one[0] != action.run]
        self.spills = [one for one in self.spills if one[0] != action.run]
        self.live.remove(action.run)
        parent = self.parents.pop(action.run, 0)
        if parent:
            self.under[parent].children.remove(action.run)
            self.came_back.append(parent)

    # ------------------------------------------------------------ what happens

    def timer(self, timer):
        at, task = self.timers.pop(timer)
        self.now = max(self.now, at)
        elapsed = None
        if task in self.under and self.under[task].hung:
            elapsed = self.now - self.under[task].since
        self.send(sig.TimerDue(timer, elapsed))

    def spilled(self, one):
        self.spills.remove(one)
        self.send(sig.Spilled(*one, ok=self.roll() < 0.8))

    def decide(self, one):
        self.deciding.remove(one)
        self.send(sig.Decided(*one, go=True))

    def pull(self, key):
        run, stage = key
        asked = self.pulls[key]
        source = self.sources.get(key)
        if source is None:
            source = self.sources[key] = self.open(run, stage)
        if asked < 0:
            del self.pulls[key]
            self.send(sig.SourceEnded(run, stage, "cancelled"))
            return
        count = 1 + self.below(asked)
        items, error, over = [], None, False
        try:
            while len(items) < count:
                items.append(next(source))
        except StopIteration:
            over = True
        except ValueError as raised:
            over, error = True, ErrorInfo(type="ValueError", message=str(raised))
        signals = []
        if items:
            self.pulls[key] = asked - len(items)
            signals.append(sig.ItemsArrived(run, stage, len(items), self.hold(run, items), SIZE))
        if over:
            signals.append(sig.SourceEnded(run, stage, "error" if error else "ok", error))
        if over or self.pulls[key] == 0:
            del self.pulls[key]
        if len(signals) == 2 and self.roll() < 0.5:
            self.pulls[key] = 0
            self.send(signals[0])
            self.pulls.pop(key, None)
            self.send(signals[1])
        else:
            self.send(*signals)

    def open(self, run, stage):
        spec = self.layouts[run].specs[stage]
        if spec.role == Role.SOURCE:
            return spec.runner(**self.commons(run, stage), ctx=None)
        return iter(self.outputs[run, spec.over])

    def hold(self, run, values):
        self._handle += 1
        self.values[run, self._handle] = values
        return self._handle

    def commons(self, run, stage):
        return {name: self.whole(run, name) for name in self.sketches[run].stages[stage].reads}

    def whole(self, run, name):
        graph = self.layouts[run].graph
        i = graph.index[name]
        if graph.streams[i]:
            return self.sequence(run, i)
        return self.outputs.get((run, i))

    def sequence(self, run, stage):
        return [value for _, part in sorted(self.kept.get((run, stage), []), key=lambda one: one[0]) for value in part]

    # ------------------------------------------------------------ ends of attempts

    def end(self, task):
        under = self.under[task]
        if self.plans and not under.spawned and self.may_spawn(under):
            under.spawned = True
            for _ in range(self.below(3)):
                self.spawn(task)
            if under.children:
                return
        if self.chance(self.deaths) and under.action.lane == "process":
            del self.under[task]
            suspect = self.roll() < 0.5
            lost = ErrorInfo(type="WorkerDiedError", message="died")
            if isinstance(under.action, act.StartBlock):
                self.send(sig.BlockPart(task, Done(()), final=True, status="lost", error=lost, suspect=suspect))
            else:
                self.send(sig.AttemptEnded(task, "lost", error=lost, suspect=suspect))
            return
        if under.stopped and (under.hung or self.roll() < 0.5):
            del self.under[task]
            if isinstance(under.action, act.StartBlock):
                self.send(sig.BlockPart(task, Done(()), final=True, status="cancelled"))
            else:
                self.send(sig.AttemptEnded(task, "cancelled"))
            return
        kind = type(under.action)
        if kind is act.StartBlock:
            self.end_block(under)
        elif kind is act.StartAttempt:
            self.end_attempt(under)
        else:
            self.end_fold(under)

    def may_spawn(self, under):
        action = under.action
        if type(action) is not act.StartAttempt or action.lane not in ("thread", "async"):
            return False  # from a worker's processes, and beside the inline lane, they run on machines of their own
        if self.waiting is not None or under.stopped or under.hung or self.depth[action.run] >= DEEPEST:
            return False
        policies = self.layouts[action.run].specs[action.stage].policies
        return policies.timeout is None and self.roll() < 0.4

    def end_attempt(self, under):
        action = under.action
        run, stage = action.run, action.stage
        spec = self.layouts[run].specs[stage]
        ended = sig.AttemptEnded(action.task, roll=self.roll(), seconds=self.below(10) / 1000)
        try:
            result = spec.runner(**self.commons(run, stage), ctx=Ctx(action.attempt, action.feedback))
        except HangError:
            under.hung = True
            if not under.stopped:
                return
            ended.status = "cancelled"
            result = None
        except ValueError as error:
            ended.status, ended.error = "error", ErrorInfo(type="ValueError", message=str(error))
            result = None
        del self.under[action.task]
        if isinstance(result, StageOutput):
            ended.status = str(result.status)
            ended.reason = result.error or result.skip_reason
            ended.retryable = result.retryable
            if ended.status in ("fail", "retry"):
                ended.error = ErrorInfo(
                    type="stageflow.StageOutput", message=result.error or "", retryable=result.retryable
                )
        elif ended.status == "ok":
            self.outputs[run, stage] = result
            if spec.kind == "route":
                ended.route = tuple(result)
        self.send(ended)

    def block_items(self, action):
        """(index, arguments) of every item of a block, by piece."""
        sketch = self.sketches[action.run].stages[action.stage]
        names = ["item", *([sketch.joined] if sketch.joined else [])]
        pieces = []
        for lo, hi, mask, columns in action.segments:
            indices = [i for i in range(lo, hi) if mask < 0 or mask >> (i - lo) & 1]
            lists = []
            for handle, at in columns:
                assert (action.run, handle) in self.values, "a block reads a value that was released"
                values = self.values[action.run, handle]
                places = range(at, at + len(indices)) if isinstance(at, int) else at
                assert len(places) == len(indices)
                lists.append([values[place] for place in places])
            pieces.append((lo, hi, indices, [dict(zip(names, row, strict=True)) for row in zip(*lists, strict=True)]))
        return pieces

    def end_block(self, under):
        """Report some more of a block, or its end."""
        action = under.action
        spec = self.layouts[action.run].specs[action.stage]
        if action.region is not None:
            self.end_region(under)
            return
        if spec.policies.batch is not None:
            self.end_batch(under)
            return
        flat = isinstance(spec.runner, FlatRunner)
        commons = self.commons(action.run, action.stage)
        rows = []  # (piece number, place, index, given)
        pieces = under.pieces
        for number, (_, _, indices, given) in enumerate(pieces):
            rows.extend(
                (number, place, index, one) for place, (index, one) in enumerate(zip(indices, given, strict=True))
            )
        assert rows, "an empty block was started"
        if under.at < len(rows):
            number = rows[under.at][0]
            mine = [row for row in rows[under.at :] if row[0] == number]
            if flat and spec.policies.replayable and self.roll() < 0.5 and self.tell_of_some(under, mine[0]):
                return
            take = 1 + self.below(len(mine))
            lo, hi, indices, _ = pieces[number]
            first, stop = mine[0][1], mine[0][1] + take
            lo = lo if first == 0 and indices[0] not in under.told else indices[first]
            hi = hi if stop == len(indices) else indices[stop]
            values, failures, counts, mask = [], [], [], 0
            for _, _, index, given in mine[:take]:
                if index in under.doomed and self.below(3):
                    status, found = "cancel", "heeded"
                else:
                    status, found = self.call(action, spec, index, {**given, **commons}, flat)
                if status == "hang":
                    under.hung = True
                    assert len(rows) == 1, "what has a timeout runs alone"
                    return
                flows = index in under.told or action.skip
                if flows and status == "ok":
                    told = under.told.setdefault(index, action.skip)
                    found = found[told:]
                if status == "ok":
                    mask |= 1 << (index - lo)
                    values.extend(found if flat else [found])
                    counts.append(len(found) if flat else 1)
                elif status == "drop":
                    counts.append(0)
                else:
                    info = ErrorInfo(
                        type="ValueError" if status == "error" else "stageflow.StageOutput",
                        message=str(found), retryable=status == "retry",
                    )  # fmt: skip
                    failures.append(ItemFailure(index, "fail" if status == "error" else status, info, (index,)))
            if mask == (1 << (hi - lo)) - 1:
                mask = -1
            keeps = spec.role != Role.SINK
            if spec.role == Role.SINK:
                sink = self.kept.setdefault((action.run, action.stage), [])
                sink.extend((self.steps, [value]) for value in values)
            done = Done(
                ((lo, hi, mask),), tuple(failures), counts=tuple(counts) if flat else None,
                seconds=take * (1 + self.below(2000)) / 1e6,
                flows=tuple((row[2], under.told[row[2]]) for row in mine[:take] if row[2] in under.told),
            )  # fmt: skip
            under.at += take
            part = sig.BlockPart(action.task, done, retries=tuple((None, None, self.roll()) for _ in failures))
            if keeps and values:
                part.handle, part.nbytes = self.hold(action.run, values), SIZE
            part.final = under.at == len(rows) and self.roll() < 0.5
        else:
            part = sig.BlockPart(action.task, Done(()), final=True)
        if under.doomed and under.at:
            part.final = True  # a block ends behind the item it was at
        if not part.final and self.roll() < 0.1 and under.at < len(rows):
            part.final = True  # a time slice is over: the rest goes back
        if part.final:
            del self.under[action.task]
        self.send(part)

    def tell_of_some(self, under, row):
        """Report one more value of an item that has not ended; False when it has no more."""
        action = under.action
        number, place, index, given = row
        spec = self.layouts[action.run].specs[action.stage]
        status, found = self.call(action, spec, index, {**given, **self.commons(action.run, action.stage)}, True)
        told = under.told.get(index, action.skip)
        if status != "ok" or len(found) <= told:
            return False
        lo = under.pieces[number][0]
        if place == 0 and lo < index and index not in under.told:
            under.told[index] = told
            self.send(sig.BlockPart(action.task, Done(((lo, index, 0),), counts=())))
        under.asks = self.below(3) == 0
        part = sig.BlockPart(action.task, Done((), counts=(1,), flows=((index, told),), asks=under.asks))
        part.handle, part.nbytes = self.hold(action.run, found[told : told + 1]), SIZE
        under.told[index] = told + 1
        self.flowed += 1
        self.send(part)
        return True

    def call(self, action, spec, index, given, flat):
        try:
            result = spec.runner(**given, ctx=Ctx(action.attempt))
            if flat:
                result = list(result)
        except HangError:
            return "hang", None
        except ValueError as error:
            return "error", error
        if result is DROP:
            return "drop", None
        if isinstance(result, StageOutput):
            status = str(result.status)
            return ("drop", None) if status == "skip" else (status, result.error)
        return "ok", result

    def end_batch(self, under):
        action = under.action
        spec = self.layouts[action.run].specs[action.stage]
        pieces = under.pieces
        items = [given["item"] for _, _, _, rows in pieces for given in rows]
        assert items, "an empty batch was started"
        assert len(items) <= spec.policies.batch
        part = sig.BlockPart(action.task, Done(()), final=True)
        try:
            values = spec.runner(item=items, **self.commons(action.run, action.stage), ctx=Ctx(action.attempt))
        except ValueError as error:
            part.status, part.error = "error", ErrorInfo(type="ValueError", message=str(error))
            part.retries = ((None, None, self.roll()),)
        else:
            ranges = []
            for lo, hi, indices, _ in pieces:
                mask = sum(1 << (index - lo) for index in indices)
                ranges.append((lo, hi, -1 if mask == (1 << (hi - lo)) - 1 else mask))
            part.done = Done(tuple(ranges))
            part.handle, part.nbytes = self.hold(action.run, values), SIZE
        del self.under[action.task]
        self.send(part)

    def end_region(self, under):
        """Report some more of a block that goes through several stages, or its end."""
        action = under.action
        specs = [self.layouts[action.run].specs[member] for member in action.region]
        rows = [
            (number, place, index, given)
            for number, (_, _, indices, items) in enumerate(under.pieces)
            for place, (index, given) in enumerate(zip(indices, items, strict=True))
        ]
        part = sig.BlockPart(action.task, Done(()), final=True)
        mine, batched = rows[under.at :], None
        if specs[0].policies.batch is not None:
            try:
                batched = specs[0].runner(
                    item=[given["item"] for *_, given in rows],
                    **self.commons(action.run, action.stage),
                    ctx=Ctx(action.attempt),
                )
            except ValueError as error:
                part.status, part.error = "error", ErrorInfo(type="ValueError", message=str(error))
        elif mine:
            mine = [row for row in mine if row[0] == mine[0][0]]
            mine = mine[: 1 + self.below(len(mine))]
        if mine and part.status == "ok":
            result = self.through(under, specs, mine, batched)
            if result is None:
                under.hung = True
                assert len(rows) == 1, "what has a timeout runs alone"
                return
            part.done, values, failed = result
            part.retries = tuple((None, None, self.roll()) for _ in range(failed))
            if values:
                part.handle, part.nbytes = self.hold(action.run, values), SIZE
            under.at += len(mine)
            part.final = under.at == len(rows) or bool(under.doomed) or self.roll() < 0.1
        if part.final:
            del self.under[action.task]
        self.send(part)

    def through(self, under, specs, mine, batched):
        """What a block's rows became in the stages of its region: a Done, its values and how many failed; None where
        one hangs."""
        action, last = under.action, len(specs) - 1
        inner = [[0, 0, 0] for _ in specs]
        results, failures, given_back = {}, [], []
        cut = self.below(len(mine) + 1) if batched and self.roll() < 0.3 else len(mine)
        for place, (_, _, index, given) in enumerate(mine):
            values = {**given, **self.commons(action.run, action.stage)}
            heeds = self.below(last + 1) if index in under.doomed and self.below(3) else -1
            for number, spec in enumerate(specs):
                if number and place >= cut:
                    given_back.append((index, 1, values["item"]))
                    break
                if number == heeds:
                    status, found = "cancel", "heeded"
                elif batched and number == 0:
                    status, found = "ok", batched[place]
                else:
                    status, found = self.call(action, spec, index, values, False)
                if status == "hang":
                    return None
                inner[number][0 if status == "ok" else 1 if status == "drop" else 2] += 1
                if status not in ("ok", "drop"):
                    info = ErrorInfo(
                        type="ValueError" if status == "error" else "stageflow.StageOutput",
                        message=str(found), retryable=status == "retry",
                    )  # fmt: skip
                    how = "fail" if status == "error" else status
                    failures.append(ItemFailure(index, how, info, (index,), number))
                    if number and status != "cancel" and (spec.policies.retry is not None or self.below(2)):
                        given_back.append((index, number, values["item"]))
                if status != "ok":
                    break
                values = {"item": found}
            else:
                results[index] = found
        back = {index for index, _, _ in given_back}
        ranges = []
        for piece in dict.fromkeys(row[0] for row in mine):
            lo, hi, indices, _ = under.pieces[piece]
            there = [row[2] for row in mine if row[0] == piece]
            lo = lo if there[0] == indices[0] else there[0]
            hi = hi if there[-1] == indices[-1] else indices[indices.index(there[-1]) + 1]
            for start, stop in ranges_without(lo, hi, back):
                ranges.append(
                    (start, stop, mask_of((i for i in there if i in results and start <= i < stop), start, stop))
                )
        done = Done(
            tuple(ranges), tuple(failures), seconds=len(mine) * (1 + self.below(2000)) / 1e6,
            inner=tuple((*row, 0.001, 0.001) for row in inner),
            handed=tuple((index, index + 1, -1, number) for index, number, _ in given_back),
        )  # fmt: skip
        return done, [*results.values(), *(value for _, _, value in given_back)], len(failures)

    def end_fold(self, under):
        action = under.action
        run, stage = action.run, action.stage
        spec = self.layouts[run].specs[stage]
        ended = sig.AttemptEnded(action.task, roll=self.roll())
        try:
            if action.job == "merge":
                acc = [one for accumulator in under.accumulators for one in accumulator]
            else:
                acc = under.accumulators[0] if under.accumulators else spec.reduce.initial
                for _, _, _, rows in under.pieces:
                    for given in rows:
                        acc = spec.runner(acc, given["item"], **self.commons(run, stage), ctx=Ctx(action.attempt))
        except ValueError as error:
            ended.status, ended.error = "error", ErrorInfo(type="ValueError", message=str(error))
        else:
            ended.handle, ended.nbytes = self.hold(run, [acc]), SIZE
        del self.under[action.task]
        self.send(ended)

    # ------------------------------------------------------------ logs

    def save(self, path, what):
        """Write everything that the machine was told, so that a fault can be replayed: `replayed` reads it."""
        machine = self.machine
        turns = [[now, [_written(signal) for signal in signals]] for now, signals in self.log]
        found = {
            "what": what,
            "lanes": {name: lane.slots for name, lane in machine.lanes.items()},
            "memory": machine.memory,
            "ahead": machine.ahead,
            "poison_limit": machine.poison_limit,
            "sketches": [repr(sketch) for sketch in self.sketches.values()],
            "turns": turns,
        }
        path.write_text("{\n" + ",\n".join(f" {json.dumps(k)}: {_lines(v)}" for k, v in found.items()) + "\n}\n")

    # ------------------------------------------------------------ the end

    def check_clean(self):
        """Nothing is left of the runs."""
        machine = self.machine
        assert not machine.runs
        assert not machine.tasks
        assert not machine.holders
        assert machine.live_bytes == 0
        assert machine.spilling == 0
        assert all(lane.used == 0 for lane in machine.lanes.values())
        assert sorted(machine.admission.free_tokens["gpu"]) == [0, 1]
        assert not machine.admission.busy
        assert (machine.admission.memory_used, machine.admission.cores_used) == (0, 0)
        assert not machine.admission.woken
        assert not machine.admission.coming
        assert not [t for t in self.timers if t not in machine.admission.timers]

    def states(self, run):
        names = {StageState.DONE: "ok", StageState.SKIPPED: "skip", StageState.FAILED: "fail"}
        raw = self.machine.final_states[run]
        return {
            spec.name: names.get(StageState(at), StageState(at).name)
            for spec, at in zip(self.layouts[run].specs, raw, strict=True)
        }

    def check_reference(self, run):
        """The end is the one that the reference works out."""
        error = self.finished[run].error
        if run in self.disturbed:
            return
        if error is not None and error.code == "SF-NO-PROGRESS":
            assert self.depth[run] > 0, "only a child needs what those who wait for it hold"
            return
        plan = self.of[run]
        sketch, wanted, loose = plan.sketch, plan.wanted, plan.loose
        assert self.finished[run].status == wanted.status, (self.finished[run], wanted)
        if not wanted.states:
            return
        if loose and self.finished[run].reason is not None:
            return  # something behind a broken stream has failed first, and ended the run
        states = self.states(run)
        assert {name: at for name, at in states.items() if name not in loose} == {
            name: at for name, at in wanted.states.items() if name not in loose
        }
        for i, stage in enumerate(sketch.stages):
            if stage.name not in wanted.values or wanted.states[stage.name] != "ok":
                continue
            value = wanted.values[stage.name]
            if stage.name in loose:
                continue
            if stage.role == "sink":
                got = [v for _, part in self.kept.get((run, i), []) for v in part]
                if stage.policies.get("ordered"):
                    assert got == value
                else:
                    assert sorted(got) == sorted(value)
            elif stage.role in ("source", "map", "flat", "batch"):
                if i in self.layouts[run].keeps or i in self.layouts[run].collectors:
                    assert self.sequence(run, i) == value, stage
            else:
                assert self.outputs[run, i] == value, stage
        names = {self.layouts[run].specs[stage].name: n for (r, stage), n in self.failed_items.items() if r == run}
        assert {n: k for n, k in names.items() if n not in loose} == {
            n: k for n, k in wanted.lost.items() if n not in loose
        }


def _written(signal):
    if type(signal) is sig.RunSubmitted:
        told = {"run": signal.run, "mode": signal.mode, "deadline": signal.deadline}
        return ["RunSubmitted", {**told, "parent": signal.parent} if signal.parent else told]
    plain = msgspec.to_builtins(signal)
    defaults = dict(zip(reversed(signal.__struct_fields__), reversed(signal.__struct_defaults__), strict=False))
    fields = {name: value for name, value in plain.items() if getattr(signal, name) != defaults.get(name, sig)}
    return [type(signal).__name__, fields]


def _lines(value):
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(f"  {json.dumps(one)}" for one in value) + "\n ]"


def replayed(path):
    """Tell a fresh machine what the log says, auditing its books after each turn; the machine."""
    found = json.loads(path.read_text())
    names = {name: getattr(policies, name) for name in ("Resources", "RetryConfig", "GuardRetryPolicy")}
    names |= {"GraphSketch": GraphSketch, "StageSketch": StageSketch, "Fate": Fate}
    sketches = [eval(text, names) for text in found["sketches"]]
    machine = Machine(
        found["lanes"], tokens={"gpu": 2}, memory=found["memory"], poison_limit=found["poison_limit"],
        ahead=found["ahead"],
    )  # fmt: skip
    for now, signals in found["turns"]:
        told = []
        for name, fields in signals:
            if name == "RunSubmitted":
                sketch = sketches[fields["run"] - 1]
                layout = Layout(sketch.build(), [stage.lane for stage in sketch.stages])
                given = {"run_id": f"run-{fields['run']}", "layout": layout, "listening": True, **fields}
                told.append(sig.RunSubmitted(**given))
            else:
                told.append(msgspec.convert(fields, type=getattr(sig, name)))
        machine.handle_all(told, now)
        audit(machine)
    return machine


__all__ = ["Plan", "Runner", "Simulation", "SourceRunner", "replayed"]
