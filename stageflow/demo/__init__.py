"""The main job on real input: an index of the running Python's own standard library, built on all lanes.

`pipeline.py` is the example to read first: the stages and how they hang together, nothing else. The work they do is in
`source.py` (one file), `index.py` (many files) and `page.py` (HTML); `command.py` is the command line around them.

Uses the public surface of `stageflow` only. May not import `stageflow.cli`, and nothing imports this room: the command
line names it and loads it on use.
"""
