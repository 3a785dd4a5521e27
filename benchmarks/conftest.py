"""The suites of this folder run when they are asked for by name: `python -m pytest benchmarks`.

Each room has a module of tests, ours and the peer in one group, so that `--benchmark-compare`, `--benchmark-autosave`
and `--benchmark-json` work as everywhere. They show; the gate and the verdicts are for the command.
"""

import pytest

from benchmarks.measures.common import engine_on_loop, our_pool, standard_pool


@pytest.fixture(scope="module")
def on_loop():
    """(runner, engine), warm for the whole module."""
    with engine_on_loop(processes=2) as pair:
        yield pair


@pytest.fixture(scope="module", params=["ours", "ppe"])
def pool(request):
    """The two process pools, warm."""
    with our_pool() if request.param == "ours" else standard_pool() as made:
        yield made
