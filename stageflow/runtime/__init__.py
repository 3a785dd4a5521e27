"""The only place where loop, clock, executors, monitor and store meet.

The driver performs the actions the scheduler returns and feeds signals back; the `Engine` is its face.

May not import: helpers, tools, websearch, testing, report, cli, demo.
Executors are named in a table and loaded on first use.
"""
