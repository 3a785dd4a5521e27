"""What happened, as frozen structs, and the `EventSink` protocol with its fan-out and bounded sinks.

May import `stageflow.core` only. Which event is emitted when is decided by the rooms above.
"""
