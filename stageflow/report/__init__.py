"""Turns a finished run into a report a person can read.

May not import: `stageflow.testing`, cli, demo.
"""
