"""WHEN each stage may run: a state machine that takes signals and returns actions, and performs none of them.

Time is an argument; equal signals in equal order give equal actions.

May not import: the runtime, any room above it, any executor, asyncio, threading, time, random, logging, psutil.
"""
