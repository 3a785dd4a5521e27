"""The `stageflow` command: parses arguments, calls the public surface, prints.

May not import `stageflow.demo` at module level: the command names it and loads it on use. Nothing imports this room.
"""
