"""The pytest plugin: fixtures for pipelines under test, offered wherever stageflow is installed.

Loaded by every pytest session of its users, so it imports nothing of the engine until a fixture is asked for.
"""
