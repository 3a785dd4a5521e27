"""What a user's test suite needs: virtual clock, scripted executor, recording sink, executor conformance suite, pytest plugin.

May not import: report, cli, demo. Nothing outside tests imports it.
"""
