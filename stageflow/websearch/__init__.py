"""Fetching, reading and searching the web as stages; needs the `web` extra.

Stands on the runtime. May not import: `stageflow.helpers`, `stageflow.tools`, testing, report, cli, demo.
"""
