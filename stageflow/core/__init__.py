"""The vocabulary every other room speaks: kinds, statuses, output, artifacts, the error tree and the ports.

Plain frozen data and protocols; nothing here decides, waits or performs I/O.

May not import: any other room of `stageflow`, any executor, asyncio, threading, time, random, logging.
"""
