"""A fresh interpreter to the result of one process stage."""

from stageflow import PipelineBuilder, StageKind


def double(number: int) -> int:
    """The least a stage can do."""
    return 2 * number


if __name__ == "__main__":
    graph = PipelineBuilder("first").stage("double", double, kind=StageKind.TRANSFORM).build()
    print(graph.run({"number": 21}, processes=1).data("double"))
