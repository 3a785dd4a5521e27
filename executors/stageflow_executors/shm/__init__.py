"""Large values in shared memory: the arena holds bytes, a lease says who may read, the codec turns objects into both.

May import `stageflow.core` only, of all of `stageflow`; numpy and arrow types are recognised without importing them.
"""
