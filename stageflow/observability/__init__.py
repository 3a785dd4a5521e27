"""How a run is seen from outside: wide events, OpenTelemetry spans, metrics, progress and trace export.

Reads events and never steers a run.

May not import: `stageflow.store`, the runtime, any room above it, any executor.
"""
