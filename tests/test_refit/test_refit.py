"""A refit is the best ridge regression of each layer, keeps the mask, and never makes the outputs worse."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.layer_calls import LayerCalls
from mmcpd.refit import refit
from mmcpd.refit.layer import solve
from mmcpd.slim import slim
from mmcpd.slim.compare import evaluating
from mmcpd.slim.mask import kept_rows, named_tensors
from mmcpd.slim.trial import random_keep
from tests.helpers import CONTROL, EXACT, Net, call, gap, masked, randomise_, rotated, sample
from tests.test_refit.nets import IMAGES, MODELS, Block, combed


@pytest.mark.parametrize('name', MODELS)
def test_a_refit_keeps_the_mask_and_mends_each_layer(name):
    model, coupling, keep = combed(MODELS[name])
    state, training = copy.deepcopy(model.state_dict()), model.train().training
    done = refit(model, coupling, keep, IMAGES.split(3), ridge=0.01)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training is training and done.model.training is training
    for key, dims in kept_rows(coupling, keep).items():
        for dim, kept in dims.items():
            assert not bool(named_tensors(done.model)[key].movedim(dim, 0)[~kept].any()), f'{key} came back'
    refitted = call(coupling, done.model)
    assert gap(refitted, call(coupling, slim(done.model, coupling, keep))) <= EXACT
    other = rotated(coupling, coupling.groups[0].name, keep)
    assert gap(refitted, call(coupling, masked(done.model, coupling, other))) > CONTROL
    report = done.report
    assert not report.skipped and not report.undone and report.refitted_distance < 0.9 * report.masked_distance
    assert sum(layer.after < 0.9 * layer.before for layer in report.refitted) >= 3
    for layer in report.refitted:
        assert layer.tensor in str(report)


def test_every_layer_that_lost_something_is_refitted():
    for name, build in MODELS.items():
        model, coupling, keep = combed(build)
        report = refit(model, coupling, keep, [IMAGES]).report
        lost = {n for n in kept_rows(coupling, keep) if model.get_parameter(n).dim() > 1} if name != 'block' else {
            n for n in kept_rows(coupling, keep) if n.endswith('weight') and 'bn' not in n
        }  # fmt: skip
        assert {layer.tensor.partition('[')[0] for layer in report.refitted} == lost
    keep = coupling.keep()
    assert refit(model, coupling, keep, [IMAGES]).report.refitted == ()


def inputs_and_outputs(model, name, images):
    """Return what a linear layer reads and puts out, as matrices."""
    found = []

    def note(seen):
        out = seen.run()
        if seen.rows.tensor == name:
            found.append((seen.input.reshape(-1, seen.input.shape[-1]), out.reshape(-1, out.shape[-1])))
        return out

    with evaluating(model), LayerCalls(model, note):
        model(images)
    return found[0]


@pytest.mark.parametrize('batches', [1, 3])
def test_the_weight_is_that_of_ridge_regression(batches):
    """Written out with the inputs of the refitted net, which the layers before it give with one batch."""
    torch.manual_seed(0)
    model = randomise_(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)))
    x = sample((60, 6))
    coupling = comb(model, x[:2])
    keep = random_keep(coupling, 0.5, 0)
    done = refit(model, coupling, keep, x.chunk(batches), ridge=0.3)
    kept = keep['0']
    old, new = model[2], done.model[2]
    z, y = inputs_and_outputs(done.model, '2.weight', x)[0][:, kept], model(x).detach()
    zc, w = z - z.mean(0), old.weight.detach()[:, kept].T
    gram = zc.T @ zc / len(x)
    ridge = 0.3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    expected = w + torch.linalg.solve(gram + ridge, zc.T @ (y - y.mean(0)) / len(x) - gram @ w)
    assert torch.allclose(new.weight[:, kept].T, expected, atol=1e-9)
    assert torch.allclose(new.bias, y.mean(0) - z.mean(0) @ expected, atol=1e-9)
    assert not torch.allclose(new.weight[:, kept].T, w, atol=1e-3)


def test_the_intercept_goes_into_the_running_mean_of_the_only_reader():
    model, coupling, keep = combed(Block)
    homes = {layer.tensor: layer.intercept for layer in refit(model, coupling, keep, [IMAGES]).report.refitted}
    assert homes == {
        'stem.weight': 'bn0.running_mean', 'conv1.weight': 'bn1.running_mean', 'conv2.weight': 'bn2.running_mean',
        'last.weight': '', 'fc.weight': 'fc.bias',
    }  # fmt: skip

    class Read(Block):
        def forward(self, x):
            x = self.stem(x)
            x = self.bn0(x).tanh() * x
            return self.fc(self.last(self.bn1(self.conv1(x))[:, :8].tanh()).relu().mean((2, 3)))

    model, coupling, keep = combed(Read)
    homes = {layer.tensor: layer.intercept for layer in refit(model, coupling, keep, [IMAGES]).report.refitted}
    assert homes['stem.weight'] == '' and homes['conv1.weight'] == 'bn1.running_mean'


def test_a_norm_takes_up_the_constant_that_was_lost():
    """A removed channel that always was the same goes into the running mean, and nothing is lost."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5)
    model = randomise_(nn.Sequential(*layers, nn.Flatten(), nn.Linear(320, 2)))
    model[0].weight.data[:2] = 0
    coupling = comb(model, IMAGES[:1])
    keep = coupling.keep()
    keep['0'][:2] = False
    done = refit(model, coupling, keep, IMAGES.split(2))
    assert {layer.tensor: layer.intercept for layer in done.report.refitted}['2.weight'] == '3.running_mean'
    assert gap(model(IMAGES), done.model(IMAGES)) < 1e-9
    assert gap(model(IMAGES), masked(model, coupling, keep)(IMAGES)) > 1e-2


class Lossy(nn.Module):
    """The stream loses a constant that the layer after it can make up for, through a gain."""

    def __init__(self, gain):
        super().__init__()
        self.stem, self.inner, self.layer = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
        self.gain, self.fc = nn.Parameter(torch.full((6, 1, 1), gain)), nn.Linear(6, 3)

    def forward(self, x):
        return self.fc((self.stem(x[:, :3]) + self.gain * self.layer(self.inner(x).tanh())).mean((2, 3)))


def test_the_target_makes_up_for_what_the_stream_has_lost():
    torch.manual_seed(0)
    model = randomise_(Lossy(0.7))
    model.gain.data.fill_(0.7)
    coupling = comb(model, IMAGES[:1])
    keep = coupling.keep()
    keep['inner'][::2] = False
    teacher = copy.deepcopy(model)
    teacher.stem.bias.data.add_(torch.tensor([1.0, -2, 3, 0, 1, 1]).double())  # a constant that the stream lacks
    done = refit(model, coupling, keep, [IMAGES], teacher=teacher)
    assert done.report.corrected == ('layer.weight',)
    plain = refit(model, coupling, keep, [IMAGES])
    moved = done.model.layer.bias - plain.model.layer.bias
    assert torch.allclose(moved, torch.tensor([1.0, -2, 3, 0, 1, 1]).double() / 0.7, atol=1e-9)
    for net in (model, teacher):
        net.gain.data.fill_(0.005)
    errors = [
        refit(model, coupling, keep, [IMAGES], teacher=net).report.refitted[-1].before for net in (model, teacher)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-9)
    assert plain.report.refitted[-1].before < 0.9 * done.report.refitted[-1].before


def test_a_layer_that_lost_nothing_makes_up_for_the_stream_before_it():
    def run(m, x):
        x = m.stem(x)
        x = x + m.b1(m.a1(x).tanh())
        return m.fc((x + m.b2(m.a2(x).tanh())).mean((2, 3)))

    torch.manual_seed(0)
    parts = {f'{kind}{i}': nn.Conv2d(6, 6, 1) for i in (1, 2) for kind in 'ab'}
    model = randomise_(Net(run, stem=nn.Conv2d(3, 6, 1), **parts, fc=nn.Linear(6, 3)))
    coupling = comb(model, IMAGES[:1])
    keep = coupling.keep()
    keep['a1'][:3] = False
    report = refit(model, coupling, keep, [IMAGES]).report
    assert report.corrected == ('b1.weight', 'b2.weight')
    assert [layer.tensor for layer in report.refitted] == ['a1.weight', 'b1.weight', 'b2.weight']
    keep = {**coupling.keep(), 'a2': ~keep['a1']}
    report = refit(model, coupling, keep, [IMAGES]).report
    assert report.corrected == ('b2.weight',), 'what runs before the first loss is left alone'


def test_what_no_layer_reads_alone_is_left_alone():
    def run(m, x):
        x = m.one(x).tanh().mean((2, 3))
        x = m.two(x).tanh() + F.linear(x, m.two.weight.T.contiguous().T * 2)
        return m.fc(x.tanh() + m.table)

    torch.manual_seed(0)
    parts = dict(one=nn.Conv2d(3, 8, 3), two=nn.Linear(8, 8), fc=nn.Linear(8, 2))
    model = randomise_(Net(run, **parts, table=nn.Parameter(torch.zeros(1, 8))))
    coupling = comb(model, IMAGES[:1])
    report = refit(model, coupling, random_keep(coupling, 0.5, 0), [IMAGES]).report
    assert {left.tensor: left.reason for left in report.skipped} == {
        'two.weight': 'its weight is also read by contiguous',
        'table': 'read by add, which is no layer',
    }


def test_a_refit_that_makes_the_outputs_worse_is_undone(monkeypatch):
    model, coupling, keep = combed(Block)
    before = masked(model, coupling, keep)

    def wrong(*args):
        found = solve(*args)
        return replace(found, weight=-9 * found.weight)

    monkeypatch.setattr('mmcpd.refit.layer.solve', wrong)
    done = refit(model, coupling, keep, [IMAGES])
    assert done.report.undone and 'undone' in str(done.report)
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in done.model.state_dict().items())


def test_batches_add_up_and_progress_is_told():
    model, coupling, keep = combed(Block)
    steps = []
    one = refit(model, coupling, keep, [IMAGES])
    many = refit(model, coupling, keep, iter(IMAGES.split(2)), progress=lambda *at: steps.append(at))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert 0 < gap(call(coupling, one.model), call(coupling, many.model)) < 0.1
    again = refit(model, coupling, keep, [(IMAGES,)])
    assert gap(call(coupling, one.model), call(coupling, again.model)) == 0
