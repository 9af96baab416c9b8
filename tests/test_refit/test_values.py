"""Outputs that are infinite, complex or no numbers, inputs of other modes, and what a forward leaves behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmcpd.comb import comb
from mmcpd.refit import absorb_, refit
from mmcpd.slim import slim
from mmcpd.slim.trial import random_keep
from tests.helpers import Net, randomise_, sample

IMAGES = sample((12, 3, 6, 6))


def built(run):
    torch.manual_seed(0)
    parts = dict(conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(8, 4))
    model = randomise_(Net(run, **parts)).eval()
    coupling = comb(model, IMAGES[:2], trial=False)
    return model, coupling, random_keep(coupling, 0.5, 0)


def logits(m, x):
    return m.fc(m.conv(x).tanh().mean((2, 3)))


def test_what_a_mask_makes_infinite_is_left_out():
    plain = built(logits)
    hidden = torch.tensor([False, True, False, False])
    masking = built(lambda m, x: logits(m, x).masked_fill(hidden, -torch.inf))
    report = refit(*masking, [IMAGES]).report
    assert not report.undone and 0 < report.refitted_distance < report.masked_distance < 1
    three = built(lambda m, x: logits(m, x)[:, ~hidden])
    assert report.masked_distance == pytest.approx(refit(*three, [IMAGES]).report.masked_distance)
    assert report.masked_distance != pytest.approx(refit(*plain, [IMAGES]).report.masked_distance)


def test_an_output_that_is_no_number_is_refused():
    model, coupling, _ = built(logits)
    with pytest.raises(ValueError, match=r'output 0 \(from 0\) of the dense model is not a number'):
        refit(model, coupling, coupling.keep(), [IMAGES * torch.nan])


def test_complex_outputs_have_a_distance():
    model, coupling, keep = built(lambda m, x: torch.fft.rfft(logits(m, x)))
    report = refit(model, coupling, keep, [IMAGES]).report
    assert 0 < report.refitted_distance < report.masked_distance


def test_tensors_of_inference_mode_are_taken():
    model, coupling, keep = built(logits)
    expected = refit(model, coupling, keep, [IMAGES]).model
    with torch.inference_mode():
        images = IMAGES.clone()
        inside = refit(model, coupling, keep, [images]).model
    for found in (inside, refit(model, coupling, keep, [images]).model):
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
        assert not any(p.is_inference() for p in found.parameters())


def test_batches_and_options_that_make_no_sense_are_refused():
    model, coupling, keep = built(logits)
    with pytest.raises(ValueError, match=r'batch 1 \(from 0\) is empty'):
        refit(model, coupling, keep, [IMAGES, IMAGES[:0]])
    for options in (dict(samples=0), dict(samples=-1), dict(gram_limit=-1)):
        with pytest.raises(ValueError, match='samples must be 1 or more, gram_limit 0 or more'):
            refit(model, coupling, keep, [IMAGES], **options)


def test_what_a_forward_writes_is_put_back():
    def run(m, x):
        if 'calls' in dict(m.named_buffers()):
            m.calls += 1
        m.last = m.conv(x).tanh()
        return m.fc(m.last.mean((2, 3)))

    model, coupling, keep = built(run)
    model.register_buffer('calls', torch.zeros(()))
    model.last = None
    coupling = comb(model, IMAGES[:2])
    before = copy.deepcopy(model.state_dict())
    assert refit(model, coupling, keep, [IMAGES]).report.refitted
    assert model.last is None and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_combing_and_slimming_draw_no_random_numbers():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = sample((1, 5, 8)).float()
    state = torch.get_rng_state()
    coupling = comb(model, x)
    slim(model, coupling, random_keep(coupling, 0.5, 0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('reentrant', [False, True])
def test_a_part_that_is_checkpointed_is_refitted_as_without(reentrant):
    def branch(m, x):
        return m.back(m.up(x).tanh())

    def plain(m, x):
        x = m.conv(x).tanh().mean((2, 3))
        return m.fc(x + branch(m, x))

    def under(m, x):
        x = m.conv(x).tanh().mean((2, 3))
        return m.fc(x + checkpoint(branch, m, x, use_reentrant=reentrant))

    torch.manual_seed(0)
    parts = dict(conv=nn.Conv2d(3, 8, 3), up=nn.Linear(8, 16), back=nn.Linear(16, 8), fc=nn.Linear(8, 4))
    model = randomise_(Net(plain, **parts)).eval()
    coupling = comb(model, IMAGES)
    keep = random_keep(coupling, 0.5, 0)
    expected = refit(model, coupling, keep, [IMAGES])
    model.run = under
    twin = Net(under, **dict(model.named_children())).eval()
    found = refit(twin, comb(twin, IMAGES), keep, [IMAGES])
    assert [layer.tensor for layer in found.report.refitted if layer.corrected] == ['back.weight']
    pairs = zip(found.model.parameters(), expected.model.parameters(), strict=True)
    assert all(torch.allclose(a, b) for a, b in pairs)


# -- absorbing ---------------------------------------------------------------------------------------------------------
def test_norms_that_share_an_affine_are_left_alone():
    def run(m, x):
        x = m.one(m.conv(x))
        return m.two(x.tanh()) + x

    torch.manual_seed(0)
    model = Net(run, conv=nn.Conv2d(3, 8, 3), one=nn.BatchNorm2d(8), two=nn.BatchNorm2d(8))
    randomise_(model).eval()
    model.two.weight, model.two.bias = model.one.weight, model.one.bias
    before = model(IMAGES)
    done = absorb_(model, [IMAGES])
    assert not done.rewritten and {each.reason for each in done.skipped} == {'another norm has the same weight or bias'}
    assert torch.equal(model(IMAGES), before)
    model.two.weight, model.two.bias = (nn.Parameter(t.detach().clone()) for t in (model.one.weight, model.one.bias))
    assert len(absorb_(model, [IMAGES]).rewritten) == 2


def test_a_channel_that_never_changes_stays_what_it_is():
    torch.manual_seed(0)
    model = randomise_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, eps=0))).eval()
    with torch.no_grad():
        model[0].weight[2] = 0
    before = model(IMAGES)
    assert absorb_(model, [IMAGES]).rewritten
    assert torch.allclose(model(IMAGES), before)
