"""The process lane: the pool and its channels on the parent's side, the fork server, and the worker's main loop.

Runs in fresh interpreters: whatever this package imports, every worker pays for.

May import `stageflow.core` and `stageflow_executors.shm` only; no rich, opentelemetry or numpy at module level.
"""
