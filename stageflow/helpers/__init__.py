"""Ready-made stages and small recipes on top of the public surface.

Stands on the runtime. May not import: `stageflow.tools`, `stageflow.websearch`, testing, report, cli, demo.
"""
