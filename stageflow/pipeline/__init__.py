"""WHAT to run, as data: the builder, the compiled integer-indexed graph, validation and policies as values.

Describes work and never starts it.

May not import: the scheduler, the runtime, any room above them, any executor,
asyncio, threading, time, random, logging.
"""
