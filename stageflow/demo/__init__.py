"""The main job on real input: an index of the running Python's own standard library, built on all lanes.

Uses the public surface only. May not import `stageflow.cli`. Nothing imports this room.
"""
