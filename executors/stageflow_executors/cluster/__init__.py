"""The lane on other machines: dask, behind its extra and imported on first use.

May import `stageflow.core` only, of all of `stageflow`.
"""
