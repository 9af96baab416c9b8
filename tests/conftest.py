"""What every test has: no GPU and no report that it does not ask for, and no garbage collected over what is loaded."""

import gc
import os
import sys

import pytest
import torch


def pytest_configure(config):
    """Hide GPUs from all but `-m cuda`: most tests hold tensors on the CPU, or compare runs bit by bit."""
    if config.option.markexpr != 'cuda':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''


def pytest_runtest_setup(item):
    if item.get_closest_marker('cuda') and not torch.cuda.is_available():
        pytest.skip('there is no CUDA device, or it is hidden: make test-cuda')


def pytest_collection_finish():
    """Spare the garbage collector what is loaded by now: each data set of MMEngine's calls it, some 0.3 s each time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_report(request, monkeypatch):
    """Spare most runs the second for their report; tests/test_report and the shipped configs write it."""
    hooks = sys.modules.get('mmcpd.engine.hooks')
    if hooks is not None and 'report' not in request.path.as_posix() and request.path.name != 'test_configs.py':
        monkeypatch.setattr(hooks, 'report_ended', lambda runner, coupling: None)
