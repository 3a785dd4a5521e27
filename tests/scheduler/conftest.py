"""Makes the simulated driver importable by the tests of this folder."""

import importlib.util
import sys
from pathlib import Path

_NAME = "stageflow_scheduler_simulator"
if _NAME not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_NAME, Path(__file__).with_name("simulator.py"))
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_NAME])
