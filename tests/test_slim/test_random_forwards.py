"""Forwards that draw random numbers: compared runs draw the same ones, and the caller's are as before."""

from __future__ import annotations

import random

import mmseg.models  # noqa: F401 - registers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmcpd.comb import comb
from mmcpd.random_state import random_state, seeded
from mmcpd.refit import refit
from mmcpd.rotate import rotate_
from mmcpd.slim import slim
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep
from tests.helpers import EXACT, Net, randomise_, rotated, sample

IMAGE, TOKENS = sample((2, 3, 8, 8)), sample((2, 5, 6))


def noisy():
    """Noise of one number for each position of the last layer; all widths before it may go."""
    return Net(
        lambda m, x: m.fc((m.b(F.gelu(m.a(x))).tanh() * torch.rand_like(x[:, :1, :6, :6])).mean((2, 3))),
        a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 6, 1), fc=nn.Linear(6, 2),
    )  # fmt: skip


def wide():
    """As many numbers as channels: a narrower model draws others; only `b` is free of that."""

    def forward(m, x):
        x = m.a(x)
        return m.fc(m.b(F.gelu(F.dropout(x, 0.5, training=True))).relu().mean((2, 3)))

    return Net(forward, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 6, 1), fc=nn.Linear(6, 2))


def states():
    python, numpy, torch_, _ = random_state()
    return python, numpy[1].tolist(), numpy[2], torch_.tolist()


def test_a_forward_that_draws_is_combed_and_its_groups_are_slimmed():
    model = randomise_(noisy())
    before = states()
    found = comb(model, IMAGE)
    assert [(g.name, g.units) for g in found.groups] == [('a', 8), ('b', 6)]
    keep = random_keep(found, 0.5, 0)
    assert compare(model, found, keep) <= EXACT
    small = slim(model, found, rotated(found, 'a', keep))
    assert compare(model, found, keep, small) > 1e-3
    assert states() == before
    with torch.no_grad():
        assert not torch.equal(model(IMAGE), model(IMAGE))


def test_channels_that_are_drawn_by_the_number_are_frozen_and_said_to_be():
    found = comb(randomise_(wide()), IMAGE)
    assert [g.name for g in found.groups] == ['b']
    assert any('draws random numbers, whose count must not depend on a width' in reason for reason in found.reasons())


def test_rotation_and_refit_compare_the_same_draws():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(6, 24), nn.Linear(8, 6)

        def forward(self, x):
            q, k, v = self.qkv(x).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
            out = (q @ k.mT / 2).softmax(-1) @ v
            return self.proj(out.transpose(1, 2).flatten(2)) * torch.rand(2, 5, 1).to(x)

    model = randomise_(Attention())
    net = randomise_(noisy())
    before = states()
    assert rotate_(model, TOKENS).heads == 2
    found = comb(net, IMAGE)
    done = refit(net, found, random_keep(found, 0.5, 0), [IMAGE])
    assert done.report.refitted_distance < done.report.masked_distance
    whole = refit(net, found, found.keep(), [IMAGE])
    assert whole.report.masked_distance == 0  # with draws of their own two runs of one model would differ
    assert states() == before


@pytest.mark.parametrize('draw', [torch.rand, lambda n: torch.tensor(np.random.rand(n)), lambda _: random.random()])
def test_a_seed_holds_inside_only(draw):
    before = states()
    with seeded(0):
        first = draw(3)
    with pytest.raises(KeyError), seeded(1):
        draw(3)
        raise KeyError
    assert states() == before
    with seeded(0):
        assert bool(torch.as_tensor(first == draw(3)).all())
    with seeded(1):
        assert not bool(torch.as_tensor(first == draw(3)).any())


def test_no_seed_is_left_for_a_gpu_that_was_not_used_yet():
    if torch.cuda.is_initialized():
        pytest.skip('a GPU is in use')
    queued = len(torch.cuda._queued_calls)
    with seeded(0):
        torch.rand(1)
    assert len(torch.cuda._queued_calls) == queued
    torch.manual_seed(0)
    assert len(torch.cuda._queued_calls) >= queued


@pytest.mark.parametrize('rand_init', [True, False])
def test_the_hamburger_head_as_it_ships(rand_init):
    config = dict(
        type='LightHamHead', in_channels=[8, 12], in_index=[0, 1], channels=16, ham_channels=16, num_classes=3,
        dropout_ratio=0.0, align_corners=False, norm_cfg=dict(type='BN'),
        ham_kwargs=dict(MD_S=1, MD_R=4, train_steps=2, eval_steps=2, inv_t=100, rand_init=rand_init),
    )  # fmt: skip
    with DefaultScope.overwrite_default_scope('mmseg'):
        head = MODELS.build(config)
    net = Net(
        lambda m, x: m.head([m.one(x).relu(), m.two(x).relu()]),
        one=nn.Conv2d(3, 8, 1), two=nn.Conv2d(3, 12, 1), head=head,
    )  # fmt: skip
    found = comb(net.eval(), IMAGE.float())
    names = {group.name for group in found.groups}
    assert {'one', 'two', 'head.align.conv'} & names >= {'one', 'two'}
    keep = random_keep(found, 0.5, 0)
    assert compare(net, found, keep) <= 1e-5
    assert compare(net, found, keep, slim(net, found, rotated(found, 'one', keep))) > 1e-4
