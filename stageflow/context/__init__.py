"""What a stage sees while it runs: the snapshot of the run, its inputs, its bundles and its attempt.

May not import: the pipeline, the scheduler, the runtime, any room above them, any executor.
"""
