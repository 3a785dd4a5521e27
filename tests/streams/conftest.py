"""One engine with two workers for all tests of the room: starting workers is what takes time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stageflow import Engine


@pytest.fixture(scope="package")
def engine() -> Iterator[Engine]:
    """Two warm workers."""
    with Engine(processes=2, threads=8) as made:
        yield made
