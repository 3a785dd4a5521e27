"""What a test suite needs: virtual clock, scripted executor, recording sink, executor conformance suite, pytest plugin.

May not import: `stageflow.report`, cli, demo, any executor.
"""
