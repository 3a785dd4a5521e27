"""The shape helpers of the builder: chain, parallel, fan-out and fan-in, branch. Each takes real runners.

A stage that a helper puts behind one other gets that stage's value in the parameter named like it, else in its first
parameter that nothing else binds. Behind several, parameters are named like them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import UNSET, StageKind
from stageflow.pipeline.signatures import runner_name
from stageflow.pipeline.spec import Role

#: a runner, or (name, runner)
Step = Any
Steps = Iterable[Step] | Mapping[str, Any]


class ShapesMixin:
    """Adds the shape helpers to `PipelineBuilder`. A helper that fails adds none of its stages."""

    if TYPE_CHECKING:
        _declared: list[Any]
        _last: str | None

        def _add(self, role: Role, name: str, runner: Any, *args: Any, **keywords: Any) -> Self: ...

    def chain(
        self, steps: Steps, after: str | Iterable[str] = (), *, prefix: str | None = None, **policies: Any
    ) -> Self:
        """Add stages one behind the other; each gets its predecessor's value, the first that of `after`.

        Names are the mapping's keys, or `prefix` + 1, 2, ..., or the runners' own. No steps change nothing.
        """
        named, feeds = _steps(steps, prefix), _tuple(after)
        with _AllOrNothing(self):
            for name, runner in named:
                self._link(name, runner, feeds, policies)
                feeds = (name,)
        return self

    def parallel(
        self, workers: Steps, after: str | Iterable[str] = (), *, prefix: str | None = None, **policies: Any
    ) -> Self:
        """Add stages side by side, all behind `after`. No workers change nothing."""
        feeds = _tuple(after)
        with _AllOrNothing(self):
            for name, runner in _steps(workers, prefix):
                self._link(name, runner, feeds, policies)
        return self

    def fan_out_fan_in(
        self,
        fan_out: Step,
        workers: Steps,
        fan_in: Step,
        after: str | Iterable[str] = (),
        *,
        prefix: str | None = None,
        **policies: Any,
    ) -> Self:
        """Add one stage, workers that each take its value, and one stage behind all of them. `last_stage` is that one.

        Without workers the last stage follows the first. The policies are the workers'.
        """
        (first, first_runner), (end, end_runner) = _step(fan_out), _step(fan_in)
        named = _steps(workers, prefix)
        with _AllOrNothing(self):
            self._link(first, first_runner, _tuple(after), {})
            for name, runner in named:
                self._link(name, runner, (first,), policies)
            self._link(end, end_runner, tuple(name for name, _ in named) or (first,), {})
        return self

    def branch(
        self,
        router: Step,
        branches: Mapping[str, Any],
        merge: Step | None = None,
        after: str | Iterable[str] = (),
        **policies: Any,
    ) -> Self:
        """Add a ROUTE stage, one stage per branch that runs when the router names it, and a stage that joins them.

        A branch is named like its key and gets the value that the router got. The merge runs when any branch did and
        sees the others as absent: give its parameters defaults or annotate them `| None`. The policies are the
        branches'.
        """
        (route, route_runner), feeds = _step(router), _tuple(after)
        end = None if merge is None else _step(merge)
        with _AllOrNothing(self):
            self._link(route, route_runner, feeds, {}, kind=StageKind.ROUTE)
            for name, runner in branches.items():
                asked = {"when": (route, name), **policies}
                self._link(name, runner, feeds, asked, also_after=(route,))
            if end is not None:
                self._link(end[0], end[1], tuple(branches) or (route,), {})
        return self

    # ------------------------------------------------------------ the same shapes under their long names

    def with_linear_chain(self, prefix: str, runners: Sequence[Any], first_depends_on: str | None = None) -> Self:
        """`chain` with stages named `prefix` + 1, 2, ..."""
        return self.chain(runners, first_depends_on or (), prefix=prefix)

    def with_parallel_stages(self, prefix: str, runners: Sequence[Any], depends_on: str | Iterable[str] = ()) -> Self:
        """`parallel` with stages named `prefix` + 1, 2, ..."""
        return self.parallel(runners, depends_on, prefix=prefix)

    def with_fan_out_fan_in(
        self,
        fan_out: Step,
        worker_prefix: str,
        runners: Sequence[Any],
        fan_in: Step,
        depends_on: str | Iterable[str] = (),
    ) -> Self:
        """`fan_out_fan_in` with workers named `worker_prefix` + 1, 2, ..."""
        return self.fan_out_fan_in(fan_out, runners, fan_in, depends_on, prefix=worker_prefix)

    def with_conditional_branch(
        self, router: Step, branches: Mapping[str, Any], merge: Step, depends_on: str | Iterable[str] = ()
    ) -> Self:
        """`branch` with a merge."""
        return self.branch(router, branches, merge, depends_on)

    def _link(
        self,
        name: str,
        runner: Any,
        feeds: tuple[str, ...],
        policies: Mapping[str, Any],
        *,
        kind: StageKind | None = None,
        also_after: tuple[str, ...] = (),
    ) -> None:
        self._add(Role.TASK, name, runner, feeds + also_after, kind, UNSET, UNSET, dict(policies), feeds=feeds)


class _AllOrNothing:
    """Takes back the stages a helper has added when one of its later ones is refused."""

    __slots__ = ("_builder", "_count", "_last")

    def __init__(self, builder: ShapesMixin) -> None:
        self._builder = builder
        self._count = len(builder._declared)
        self._last = builder._last

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is not None:
            del self._builder._declared[self._count :]
            self._builder._last = self._last


def _tuple(after: str | Iterable[str]) -> tuple[str, ...]:
    return (after,) if isinstance(after, str) else tuple(after)


def _step(step: Step) -> tuple[str, Any]:
    if isinstance(step, tuple) and len(step) == 2 and isinstance(step[0], str):
        return step
    name = runner_name(step)
    if name is None:
        raise DefinitionError(f"{step!r} says no name for its stage", hint='Give it as ("name", runner).')
    return name, step


def _steps(steps: Steps, prefix: str | None) -> list[tuple[str, Any]]:
    if isinstance(steps, Mapping):
        return list(steps.items())
    if prefix is None:
        return [_step(step) for step in steps]
    return [(f"{prefix}{number}", step) for number, step in enumerate(steps, start=1)]
