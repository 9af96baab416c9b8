"""The dense model teaches a small one without labels."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, set_random_seed
from torch import nn

from mmcpd.distill import KDLoss
from mmcpd.engine.build import build_dense
from mmcpd.engine.label_free import RATE, _optimizer, difference, teach_
from mmcpd.engine.pictures import pictures
from mmcpd.slim.compare import evaluating
from tests.test_tools.conftest import ROOT, TINY


@pytest.fixture
def cfg(tmp_path) -> Config:
    file = tmp_path / 'tiny.py'
    file.write_text(TINY.format(root=str(ROOT)))
    return Config.fromfile(file)


@pytest.fixture
def digits(cfg) -> torch.Tensor:
    return torch.cat(pictures(cfg, build_dense(cfg), 64))


@pytest.fixture
def pair(cfg) -> tuple[nn.Module, nn.Module]:
    """A teacher that knows something, and a student that lost some of it."""
    set_random_seed(0)
    teacher = build_dense(cfg).train()
    optimizer = torch.optim.Adam(teacher.parameters(), lr=1e-3)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    for _ in range(10):
        for data in loader:
            inputs = teacher.data_preprocessor(data, True)
            optimizer.zero_grad()
            teacher.parse_losses(teacher(**inputs, mode='loss'))[0].backward()
            optimizer.step()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    return student, teacher.eval()


def gap(student: nn.Module, teacher: nn.Module, digits: torch.Tensor) -> float:
    with evaluating(student), evaluating(teacher):
        return float(difference([student(digits)], [teacher(digits)], softmax=False))


@pytest.mark.parametrize('softmax', [True, False])
@pytest.mark.parametrize('own', [True, False])
def test_the_student_comes_nearer(pair, cfg, digits, softmax, own):
    student, teacher = pair
    weights = copy.deepcopy(teacher.state_dict())
    before, seen = gap(student, teacher, digits), []
    teach_(
        student, teacher, cfg, 60, softmax=softmax, lr=0.003, pictures=[*digits.split(16)] if own else None,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(done, 60) for done in range(1, 61)]
    assert gap(student, teacher, digits) < 0.9 * before
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())
    assert not student.training


def test_labels_are_not_read(pair, cfg):
    student, teacher = pair
    twin = copy.deepcopy(student)

    class Blind(type(student.data_preprocessor)):
        def forward(self, data, training=False):
            for sample in data['data_samples']:
                sample.set_gt_label(torch.tensor([9]))  # all wrong
            return super().forward(data, training)

    twin.data_preprocessor.__class__ = Blind
    for model in (student, twin):
        teach_(model, teacher, cfg, 4, softmax=True, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), twin.parameters(), strict=True))


def test_the_rate_is_a_tenth_of_the_configs_unless_given(pair, cfg):
    student, _ = pair
    assert _optimizer(student, cfg, None).optimizer.param_groups[0]['lr'] == pytest.approx(RATE * 0.01)
    assert _optimizer(student, cfg, 0.3).optimizer.param_groups[0]['lr'] == 0.3
    cfg.default_hooks.prune = dict(type='mmcpd.PruneHook')
    assert _optimizer(student, cfg, None).optimizer.param_groups[0]['lr'] == 0.01
    cfg.optim_wrapper = None
    with pytest.raises(ValueError, match='has no optim_wrapper'):
        _optimizer(student, cfg, None)


def test_a_rate_that_is_too_high_is_said(pair, cfg):
    student, teacher = pair
    with pytest.raises(ValueError, match='lower the learning rate'):
        teach_(student, teacher, cfg, 50, softmax=False, lr=1e6)


def test_the_difference_is_of_every_output():
    torch.manual_seed(0)
    wanted = [torch.randn(4, 5), torch.randn(4, 3, 8, 8), torch.arange(4)]
    outputs = [wanted[0] + 1.5 * torch.randn(4, 5), wanted[1] * 0, wanted[2]]
    kd = KDLoss()(outputs[0], wanted[0])
    share = wanted[1].square().mean() / wanted[1].var()
    assert difference(outputs, wanted, softmax=True) == pytest.approx(float(kd + share))
    first = (outputs[0] - wanted[0]).square().mean() / wanted[0].var()
    assert difference(outputs, wanted, softmax=False) == pytest.approx(float(first + share))


class Strides(nn.Module):
    """A head that gives out boxes in pixels, and in units of a stride while it trains, as FCOS does."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.1)
        self.seen = []

    def forward(self, inputs):
        self.seen.append((self.training, self.conv.training, self.bn.training, self.drop.training))
        out = self.drop(self.bn(self.conv(inputs)))
        return out if self.training else 8 * out


@pytest.mark.parametrize('frozen', [False, True])
def test_a_head_that_gives_out_something_else_while_it_trains_is_taught_as_deployed(cfg, frozen):
    torch.manual_seed(0)
    teacher, pages, passed = Strides(), torch.rand(16, 3, 8, 8), []
    for _ in range(50):  # the statistics of its norm
        teacher(pages)
    student = copy.deepcopy(teacher.eval())
    student.bn.weight.data *= 0.8
    if frozen:  # as backbones with `norm_eval` keep their norms
        student.train = lambda mode=True: (nn.Module.train(student, mode), student.bn.eval())[0]

    def forward(model, inputs):
        passed.append(model)
        return model(inputs)

    def distance():
        with torch.no_grad():
            return float(difference([student.eval()(pages)], [teacher(pages)], softmax=False))

    before, student.seen = distance(), []
    cfg.optim_wrapper.optimizer = dict(type='Adam', lr=0.01)
    teach_(student, teacher, cfg, 100, softmax=False, forward=forward, lr=0.01, pictures=[pages])
    assert set(student.seen) == {(False, True, not frozen, True)}
    assert set(map(id, passed)) == {id(student), id(teacher)}
    assert distance() < 0.5 * before and not any(module.training for module in student.modules() if not frozen)
