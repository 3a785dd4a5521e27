"""What survives a process: durable runs and idempotency records, in SQLite by default.

May not import: `stageflow.observability`, the runtime, any room above it, any executor.
"""
