"""A model's metrics without a Runner are those that the Runner finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmcpd.engine.build import build_dense
from mmcpd.engine.evaluate import evaluate, has_metrics
from tests.test_tools.conftest import ROOT, TINY


@pytest.fixture
def cfg(tmp_path) -> Config:
    file = tmp_path / 'tiny.py'
    file.write_text(TINY.format(root=str(ROOT)))
    return Config.fromfile(file)


def test_they_are_the_runners(cfg, tmp_path):
    torch.manual_seed(0)
    model = build_dense(cfg)
    cfg.work_dir, cfg.train_dataloader, cfg.train_cfg, cfg.optim_wrapper = str(tmp_path / 'work'), None, None, None
    runner = Runner.from_cfg(cfg)
    runner.model.load_state_dict(model.state_dict())
    model.train()
    seen = []
    found = evaluate(model, cfg, progress=lambda done, total: seen.append((done, total)))
    assert found == pytest.approx(runner.val())
    assert 0 < found['accuracy/top1'] < 100
    assert seen == [(1, 2), (2, 2)]
    assert all(module.training for module in model.modules())
    shares = []
    for label in range(10):  # always this answer
        model.head.fc.bias.data = 1e6 * torch.eye(10)[label]
        shares.append(evaluate(model, cfg)['accuracy/top1'])
    assert sum(shares) == pytest.approx(100) and len(set(shares)) > 1


def test_nothing_is_written(cfg, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(Path.cwd().rglob('*'))
    evaluate(build_dense(cfg), cfg)
    assert sorted(Path.cwd().rglob('*')) == before


def test_a_list_of_metrics_and_an_evaluators_own_dict(cfg):
    model = build_dense(cfg)
    one = evaluate(model, cfg)
    metric = dict(type='mmpretrain.Accuracy', topk=(1,))
    cfg.val_evaluator = [metric, dict(type='mmpretrain.SingleLabelMetric', items=['recall'])]
    assert evaluate(model, cfg) == pytest.approx(
        {**one, 'single-label/recall': evaluate(model, cfg)['single-label/recall']}
    )
    cfg.val_evaluator = dict(type='Evaluator', metrics=[metric])
    assert evaluate(model, cfg) == pytest.approx(one)


def test_the_test_data_do_where_there_are_no_others(cfg):
    model = build_dense(cfg)
    cfg.val_dataloader = None
    assert evaluate(model, cfg)
    cfg.test_evaluator = None
    assert not has_metrics(cfg)
    with pytest.raises(ValueError, match='neither val_dataloader'):
        evaluate(model, cfg)
