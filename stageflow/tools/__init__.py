"""Tools a stage may call on behalf of a model or a user, with their schemas and limits.

Stands on the runtime. May not import: `stageflow.helpers`, `stageflow.websearch`, testing, report, cli, demo.
"""
