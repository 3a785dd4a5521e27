"""Stageflow: a pipeline engine for one machine and all its cores.

The public names live in the rooms below and are loaded on first use; importing this package alone loads none of them.
"""
