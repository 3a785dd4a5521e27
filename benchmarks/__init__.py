"""Every claim about speed, beside a peer or a limit measured in the same minute.

`python -m benchmarks run` prints the table of the README and writes it there; `quick` measures ours only; `check` holds
the present code against the committed baseline. Nothing here is imported by the library.
"""
