"""The `stageflow` command: parses arguments, calls the public surface, prints.

- `main.py`: the command group, loaded piece by piece, and the one place where an error becomes a line and an exit code;
- `loading.py`: `MODULE:GRAPH` to a graph; `inputs.py`: `--input` to typed values;
- `run.py`, `look.py` (plan, draw), `doctor.py`, `replay.py`, `completion.py`: the commands; `show.py`: how results are
  printed.

Exit codes: 0 success, 1 a stage failed, 2 the user's mistake, 130 interrupted (143 by SIGTERM). Standard output holds
what was asked for and nothing else; progress and messages go to standard error.

May not import `stageflow.demo` or `stageflow.websearch` or `stageflow.tools`: their commands are named in a table and
loaded on use. Nothing imports this room.
"""
