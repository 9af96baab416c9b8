"""A fixture that builds tiny runs, each in a folder of its own."""

from __future__ import annotations

import pytest
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from tests.test_engine.tiny_runs import config


@pytest.fixture
def runner_of(tmp_path):
    """Return `build(name, **changes) -> Runner`, each in a folder of its own unless the name repeats."""
    made = []

    def build(name='run', **changes):
        cfg = config(tmp_path / name, **changes)
        # Runs of one name that begin within one second share a log: those of other tests too.
        cfg.experiment_name += f'_{tmp_path.name}_{len(made)}'
        made.append(Runner.from_cfg(cfg))
        return made[-1]

    yield build
    DefaultScope._instance_dict.clear()
