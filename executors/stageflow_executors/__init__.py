"""The lanes: how an attempt of a stage is carried out, on the loop, in threads, in processes or on a cluster.

Every lane fulfils the executor port of `stageflow.core`.

May import `stageflow.core` only, of all of `stageflow`. The engine never imports this package: it loads lanes by name.
"""
