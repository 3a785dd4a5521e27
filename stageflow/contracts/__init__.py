"""Typed outputs: the contract of a stage's value and the registry of schemas that checks it.

May not import: `stageflow.context`, the pipeline, the scheduler, the runtime or any room above them.
"""
