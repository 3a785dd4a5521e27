"""Lanes on other machines: dask and ray, each behind its extra and imported on first use.

May import `stageflow.core` only, of all of `stageflow`.
"""
