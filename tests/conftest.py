"""What every test has: no garbage collected over what is loaded, and no report that it does not ask for."""

import gc
import sys

import pytest


def pytest_collection_finish():
    """Spare the garbage collector what is loaded by now: each data set of MMEngine's calls it, some 0.3 s each time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_report(request, monkeypatch):
    """Spare most runs the second for their report; tests/test_report and the shipped configs write it."""
    hooks = sys.modules.get('mmcpd.engine.hooks')
    if hooks is not None and 'report' not in request.path.as_posix() and request.path.name != 'test_configs.py':
        monkeypatch.setattr(hooks, 'report_ended', lambda runner, coupling: None)
