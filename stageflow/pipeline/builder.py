"""`PipelineBuilder`: records what the author says.

Nothing is resolved before `build()`, so stages may be named before they exist.

A call that raises leaves the builder as it was. What can only be judged with all stages known is judged by `build()`,
which reports every problem together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from stageflow.core.errors import DefinitionError
from stageflow.core.kinds import UNSET, StageKind
from stageflow.pipeline.compile import Declared, compile_graph
from stageflow.pipeline.decorator import marked, to_kind
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.policies import DEFAULT_POLICIES, Policies, PolicyPool
from stageflow.pipeline.problems import Problems
from stageflow.pipeline.shapes import ShapesMixin
from stageflow.pipeline.signatures import TraitsCache, runner_name
from stageflow.pipeline.spec import BLOCK, ReduceSpec, Role

Names = str | Iterable[str]
Inputs = Mapping[str, str | None]


class PipelineBuilder(ShapesMixin):
    """Declares stages, then `build()`s a StageGraph. Every declaring call returns the builder.

    `inputs` declares the inputs of the graph as {name: annotation} (or a sequence of names); where it is given, a
    parameter that names neither a stage nor one of these is an error of `build()`, else it becomes a required input.
    """

    def __init__(self, name: str, inputs: Mapping[str, Any] | Iterable[str] | None = None) -> None:
        self._name = name
        self._declared: list[Declared] = []
        self._traits = TraitsCache()
        self._pool = PolicyPool()
        self._last: str | None = None
        if isinstance(inputs, str):
            inputs = (inputs,)
        if inputs is None or isinstance(inputs, Mapping):
            self._inputs = None if inputs is None else dict(inputs)
        else:
            self._inputs = dict.fromkeys(inputs)

    def __repr__(self) -> str:
        return f"<PipelineBuilder {self._name!r}: {len(self._declared)} stages>"

    @property
    def name(self) -> str:
        """The pipeline's name."""
        return self._name

    @property
    def stage_count(self) -> int:
        """How many stages are declared so far."""
        return len(self._declared)

    @property
    def last_stage(self) -> str | None:
        """The stage declared last; for a shape helper, its end."""
        return self._last

    # ------------------------------------------------------------ declaring

    def stage(
        self,
        name: str | Any,
        runner: Any = UNSET,
        after: Names = (),
        *,
        kind: StageKind | str | None = None,
        inputs: Inputs | None = UNSET,  # type: ignore[assignment]
        executor: str | None = UNSET,  # type: ignore[assignment]
        **policies: Any,
    ) -> Self:
        """Add a task that runs once per run; a generator function gives a stream of elements.

        `after` adds dependencies in order only; `inputs={"parameter": "stage or input"}` renames. `.stage(function)`
        takes the name from the function.
        """
        if runner is UNSET:
            name, runner = self._named(name)
        return self._add(Role.TASK, name, runner, after, kind, inputs, executor, policies)

    def map(
        self,
        name: str,
        runner: Any,
        over: str,
        after: Names = (),
        *,
        kind: StageKind | str | None = None,
        inputs: Inputs | None = UNSET,  # type: ignore[assignment]
        executor: str | None = UNSET,  # type: ignore[assignment]
        **policies: Any,
    ) -> Self:
        """Add a stage that runs once per element of `over`: a stage, or an input of the graph that holds an iterable.

        A generator gives any number of elements for each; `DROP` removes one; `batch=n` hands over lists of up to n.
        """
        return self._add(Role.MAP, name, runner, after, kind, inputs, executor, policies, over=over)

    def reduce(
        self,
        name: str,
        runner: Any,
        over: str,
        after: Names = (),
        *,
        initial: Any = UNSET,
        combine: Callable[[Any, Any], Any] | None = None,
        block: int = BLOCK,
        kind: StageKind | str | None = None,
        inputs: Inputs | None = UNSET,  # type: ignore[assignment]
        executor: str | None = UNSET,  # type: ignore[assignment]
        **policies: Any,
    ) -> Self:
        """Add a fold of the elements of `over`: `runner(acc, item)`.

        Without `initial` the first element starts the fold, and empty input fails. With `combine` (associative;
        `initial` neutral to it) blocks of `block` elements fold in parallel and are merged by a fixed tree.
        """
        if combine is not None and not callable(combine):
            raise DefinitionError(
                f"reduce {name!r}: combine={combine!r} is not callable", hint="Give a function of two accumulators."
            )
        if type(block) is not int or block < 1:
            raise DefinitionError(
                f"reduce {name!r}: block={block!r} is not possible", hint="It must be a whole number of at least 1."
            )
        given = initial is not UNSET
        reduce = ReduceSpec(initial if given else None, given, combine, block)
        return self._add(Role.REDUCE, name, runner, after, kind, inputs, executor, policies, over=over, reduce=reduce)

    def sink(
        self,
        name: str,
        runner: Any,
        over: str,
        after: Names = (),
        *,
        kind: StageKind | str | None = None,
        inputs: Inputs | None = UNSET,  # type: ignore[assignment]
        executor: str | None = UNSET,  # type: ignore[assignment]
        **policies: Any,
    ) -> Self:
        """Add a map whose results are not kept: the end of a stream."""
        return self._add(Role.SINK, name, runner, after, kind, inputs, executor, policies, over=over)

    def subpipeline(
        self,
        name: str,
        graph: StageGraph | PipelineBuilder,
        after: Names = (),
        *,
        over: str | None = None,
        inputs: Inputs | None = UNSET,  # type: ignore[assignment]
        **policies: Any,
    ) -> Self:
        """Add a whole graph as one stage (with `over`: once per element). Its inputs are bound by name like parameters.

        Its value is the mapping of what its final stages gave.
        """
        child = graph.build() if isinstance(graph, PipelineBuilder) else graph
        if not isinstance(child, StageGraph):
            raise DefinitionError(
                f"subpipeline {name!r}: {child!r} is no graph", hint="Give a StageGraph or a PipelineBuilder."
            )
        role = Role.TASK if over is None else Role.MAP
        return self._add(role, name, child, after, None, inputs, UNSET, policies, over=over)

    def _named(self, runner: Any) -> tuple[str, Any]:
        if isinstance(runner, str):
            raise DefinitionError(
                f"stage {runner!r} has no runner",
                hint="Give a function, or an object with execute(ctx), as second argument.",
            )
        name = runner_name(runner)
        if name is None:
            raise DefinitionError(f"{runner!r} says no name for its stage", hint='Write .stage("name", runner).')
        return name, runner

    def _add(
        self,
        role: Role,
        name: str,
        runner: Any,
        after: Names,
        kind: StageKind | str | None,
        inputs: Any,
        executor: Any,
        policies: dict[str, Any],
        *,
        over: str | None = None,
        reduce: ReduceSpec | None = None,
        feeds: tuple[str, ...] = (),
        last: str | None = None,
    ) -> Self:
        mark = marked(runner)
        if executor is not UNSET:
            policies["executor"] = executor
        if mark:
            policies = {n: v for n, v in mark.items() if n not in ("kind", "name", "inputs")} | policies
            kind = mark.get("kind") if kind is None else kind
            inputs = mark.get("inputs", UNSET) if inputs is UNSET else inputs
        made: Policies = DEFAULT_POLICIES
        if policies:
            made = self._pool.make(policies, where=f"{_WORDS[role]} {name!r}")
        if kind is not None:
            kind = to_kind(kind, where=f"{_WORDS[role]} {name!r}")
        if inputs is UNSET or inputs is None:
            inputs = None
        elif not isinstance(inputs, Mapping):
            raise DefinitionError(
                f"stage {name!r}: inputs= must be a mapping", hint='Write inputs={"parameter": "stage"}.'
            )
        if over is not None and not isinstance(over, str):
            raise DefinitionError(
                f"{_WORDS[role]} {name!r}: over={over!r} must be a name", hint="Give the stage's name as text."
            )
        declared = Declared(
            role,
            name,
            self._traits.of(runner),
            kind,
            made,
            _names(name, after),
            inputs and dict(inputs),
            over,
            reduce,
            feeds,
        )
        self._declared.append(declared)
        self._last = last or name
        return self

    # ------------------------------------------------------------ joining and building

    def compose(self, other: PipelineBuilder) -> Self:
        """Take over the stages of `other`; the name becomes `left+right`.

        A stage both declare must be the same in both.

        Raises:
            PipelineValidationError: every stage and input that the two declare differently; the builder is unchanged.
        """
        problems = Problems()
        mine = {declared.name: declared for declared in self._declared}
        added: list[Declared] = []
        for theirs in other._declared:
            ours = mine.get(theirs.name)
            if ours is None:
                added.append(theirs)
            elif different := ours.differences(theirs):
                problems.add(
                    "CONFLICT",
                    f"both pipelines declare stage {theirs.name!r}, but with different {', '.join(different)}",
                    "Rename one of them, or make the two the same.",
                    stages=(theirs.name,),
                    different=different,
                )
        inputs = self._inputs
        if self._inputs is not None and other._inputs is not None:
            for key in self._inputs.keys() & other._inputs.keys():
                if self._inputs[key] != other._inputs[key]:
                    problems.add(
                        "CONFLICT",
                        f"both pipelines declare input {key!r}, but with different types",
                        "Declare it alike.",
                    )
            inputs = self._inputs | other._inputs
        elif other._inputs is not None or self._inputs is not None:
            inputs = None  # one of the two accepts any input, and so does what both make together
        name = f"{self._name}+{other._name}"
        problems.raise_if_any(name)
        self._name, self._inputs = name, inputs
        self._declared.extend(added)
        for declared in added:
            self._traits.of(declared.traits.runner)
        self._last = other._last or self._last
        return self

    def build(self) -> StageGraph:
        """Check everything and compile. The builder may be used further.

        Raises:
            PipelineValidationError: with every problem found in `problems`.
        """
        return compile_graph(self._name, self._declared, self._inputs)


_WORDS = {Role.TASK: "stage", Role.SOURCE: "stage", Role.MAP: "map", Role.REDUCE: "reduce", Role.SINK: "sink"}


def _names(stage: str, after: Names) -> tuple[str, ...]:
    """`after` as a tuple without repeats; one name may be given as plain text."""
    if not after:
        return ()
    if isinstance(after, str):
        return (after,)
    names = tuple(dict.fromkeys(after))
    if not all(isinstance(one, str) for one in names):
        raise DefinitionError(f"stage {stage!r}: after={after!r} must hold names", hint="Give stage names as text.")
    return names
