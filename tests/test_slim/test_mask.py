"""Masks that stay through training, and norms over the units that stay: as if the model were slim already."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import mask_, slim
from mmcpd.slim.mask import MaskedForward, Masker, kept_rows, named_tensors
from mmcpd.slim.trial import random_keep
from tests.helpers import Net, check_equal, gap, masked, members, randomise_, rows, sample

IMAGE = sample((4, 3, 6, 6))


class ChannelFirst(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Mixed(nn.Module):
    """Every norm, a residual, a concatenation, attention with a scale of its own."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.gn, self.outer = nn.Conv2d(8, 6, 1), nn.GroupNorm(2, 6), nn.Conv2d(6, 8, 1)
        self.side, self.first = nn.Conv2d(8, 4, 1), ChannelFirst(12)
        self.qkv, self.proj, self.ln = nn.Linear(12, 18), nn.Linear(6, 12), nn.LayerNorm(12)
        self.fc = nn.Linear(12, 3)

    def forward(self, x):
        x = self.bn(self.stem(x)).tanh()
        x = x + self.outer(self.gn(self.inner(x)).tanh())
        x = self.first(torch.cat([x, self.side(x)], 1)).flatten(2).mT
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.proj((q @ k.mT * 0.3).softmax(-1) @ v)
        return self.fc(self.ln(x).mean(1))


@pytest.fixture
def mixed():
    torch.manual_seed(0)
    model = randomise_(Mixed())
    return model, comb(model, IMAGE)


def loss(model: nn.Module) -> torch.Tensor:
    out = model(IMAGE)
    return (out * torch.arange(1, 4, dtype=out.dtype)).square().mean()


def cut(found, keep, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the live rows of a tensor of the masked model."""
    for dim, live in kept_rows(found, keep).get(name, {}).items():
        tensor = tensor.index_select(dim, live.nonzero().flatten())
    return tensor


def test_outputs_and_gradients_in_training_mode_are_those_of_the_slim_model(mixed):
    model, found = mixed
    assert {g.name: g.units for g in found.groups} == {'stem': 8, 'inner': 3, 'side': 4, 'qkv': 6}
    for seed in range(3):
        keep = random_keep(found, 0.6, seed)
        big, small = masked(model, found, keep).train(), slim(model, found, keep).train()
        assert gap(big(IMAGE), small(IMAGE)) < 1e-9
        loss(big).backward()
        loss(small).backward()
        gradients = dict(small.named_parameters())
        for name, parameter in big.named_parameters():
            live = cut(found, keep, name, parameter.grad)
            assert gap(gradients[name].grad, live) < 1e-9, name
        other = masked(model, found, {**keep, 'stem': keep['stem'].roll(1)}).train()
        assert gap(big(IMAGE), other(IMAGE)) > 1e-5


def test_a_masked_norm_without_the_live_units_would_be_wrong(mixed):
    model, found = mixed
    keep = random_keep(found, 0.6, 0)
    big, small = masked(model, found, keep), slim(model, found, keep)
    for module in big.modules():
        vars(module).pop('forward', None)
    assert gap(small(IMAGE), big(IMAGE)) > 1e-3


OPTIMIZERS = {
    'sgd': lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),
    'momentum': lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    'nesterov': lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    'adamw': lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    'rmsprop': lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_training_masked_is_training_slim(mixed, name):
    model, found = mixed
    keep = random_keep(found, 0.6, 1)
    big, small = copy.deepcopy(model).train(), slim(model, found, keep).train()
    ours, theirs = OPTIMIZERS[name](big.parameters()), OPTIMIZERS[name](small.parameters())
    masker = Masker(big, found)
    masker.apply_(keep)
    for _ in range(4):
        for net, optimizer in ((big, ours), (small, theirs)):
            optimizer.zero_grad()
            loss(net).backward()
            optimizer.step()
        masker.apply_(keep)
        masker.apply_state_(keep, ours)
    tensors = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    for tensor_name, tensor in {**dict(big.named_parameters()), **dict(big.named_buffers())}.items():
        live = cut(found, keep, tensor_name, tensor)
        assert live.shape == tensors[tensor_name].shape
        torch.testing.assert_close(live, tensors[tensor_name], rtol=1e-8, atol=1e-10)
    assert gap(small.eval()(IMAGE), big.eval()(IMAGE)) < 1e-8
    for tensor_name, dims in kept_rows(found, keep).items():
        for dim, live in dims.items():
            assert not named_tensors(big)[tensor_name].index_select(dim, (~live).nonzero().flatten()).any()


@pytest.mark.parametrize('name', ['momentum', 'adamw'])
def test_momentum_from_before_the_mask_revives_weights_unless_it_is_cleared(mixed, name):
    model, found = mixed
    keep = found.keep()
    keep['stem'][:3] = False
    moved = {}
    for clear in (False, True):
        net = copy.deepcopy(model).train()
        optimizer, masker = OPTIMIZERS[name](net.parameters()), Masker(net, found)
        loss(net).backward()
        optimizer.step()  # the state now remembers every row
        masker.apply_(keep)
        if clear:
            masker.apply_state_(keep, optimizer)
            for state in optimizer.state[net.stem.weight].values():
                if state.dim():
                    assert not state[:3].any() and state[3:].any()
        optimizer.zero_grad()
        loss(net).backward()
        optimizer.step()
        moved[clear] = float(net.stem.weight[:3].detach().abs().max())
        masker.apply_(keep)
        assert not net.stem.weight[:3].any()
    assert moved[False] > 1e-4
    assert moved[True] == 0


def test_a_masked_row_is_zero_whatever_it_was(mixed):
    model, found = mixed
    keep = found.keep()
    keep['stem'][0] = False
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss(model).backward()
    optimizer.step()
    with torch.no_grad():
        model.stem.weight[0, 0] = float('nan')
        model.stem.weight[0, 1] = float('inf')
        model.bn.running_var[0] = float('inf')
    masker = Masker(model, found)
    masker.apply_(keep)
    masker.apply_state_(keep, optimizer)
    assert not model.stem.weight[0].any() and float(model.bn.running_var[0]) == 0
    assert not optimizer.state[model.stem.weight]['momentum_buffer'][0].any()
    assert bool(torch.isfinite(model.eval()(IMAGE)).all())


def test_a_full_keep_gives_the_norms_back(mixed):
    model, found = mixed
    before = model(IMAGE)
    mask_(model, found, found.keep())
    assert gap(before, model(IMAGE)) == 0
    masker = Masker(model, found)
    masker.apply_(random_keep(found, 0.5, 0))
    changed = [n for n, m in model.named_modules() if isinstance(vars(m).get('forward'), MaskedForward)]
    assert changed == ['gn', 'first', 'ln']
    masker.apply_(found.keep())
    assert not any('forward' in vars(m) for m in model.modules())


def test_masks_only_grow_when_asked(mixed):
    model, found = mixed
    masker, keep = Masker(model, found), found.keep()
    outputs = []
    for unit in range(3):
        keep['stem'][unit] = False  # the very same tensors, changed in place
        masker.apply_(keep)
        outputs.append(gap(slim(model, found, keep)(IMAGE), model(IMAGE)))
    assert max(outputs) < 1e-9
    assert model.bn.weight.count_nonzero() == 5


def test_a_copy_of_a_masked_model_masks_itself(mixed):
    model, found = mixed
    keep = random_keep(found, 0.6, 0)
    mask_(model, found, keep)
    before = model(IMAGE)
    twin = copy.deepcopy(model)
    assert gap(before, twin(IMAGE)) == 0
    assert vars(twin.ln)['forward'].module is twin.ln
    with torch.no_grad():
        twin.ln.weight.mul_(2)
        twin.gn.bias.add_(0.1)
    assert gap(before, model(IMAGE)) == 0
    assert gap(before, twin(IMAGE)) > 1e-3
    twin.load_state_dict(model.state_dict())
    assert gap(before, twin(IMAGE)) == 0


def test_a_state_dict_of_a_masked_model_is_a_plain_one(mixed, tmp_path):
    model, found = mixed
    keys = list(model.state_dict())
    keep = random_keep(found, 0.6, 0)
    mask_(model, found, keep)
    assert list(model.state_dict()) == keys
    torch.save({'state': model.state_dict(), 'keep': keep}, tmp_path / 'masked.pth')
    saved = torch.load(tmp_path / 'masked.pth', weights_only=True)
    fresh = Mixed().double().eval()
    fresh.load_state_dict(saved['state'])
    assert gap(model(IMAGE), fresh(IMAGE)) > 1e-3  # the norms are not masked yet
    mask_(fresh, found, saved['keep'])
    assert gap(model(IMAGE), fresh(IMAGE)) == 0


def test_slimming_a_masked_model_is_slimming_the_dense_one(mixed):
    model, found = mixed
    keep = random_keep(found, 0.6, 0)
    one, other = slim(model, found, keep), slim(masked(model, found, keep), found, keep)
    assert gap(one(IMAGE), other(IMAGE)) == 0
    assert not any('forward' in vars(m) for m in other.modules())


def test_masks_under_autocast(mixed):
    model, found = mixed
    model.float()
    keep = random_keep(found, 0.6, 0)
    big, small = masked(model, found, keep), slim(model, found, keep)
    with torch.autocast('cpu', torch.bfloat16):
        assert gap(small(IMAGE.float()).float(), big(IMAGE.float()).float()) < 0.05


def test_two_norms_of_one_module_that_differ_in_width():
    def run(m, x):
        one, other = F.layer_norm(m.a(x), (m.wide,)), F.layer_norm(m.b(x), (m.narrow,))
        return m.fc(torch.cat([one, other], -1))

    model = randomise_(Net(run, a=nn.Linear(3, 6), b=nn.Linear(3, 5), fc=nn.Linear(11, 2), wide=6, narrow=5))
    x = sample((5, 3))
    found = comb(model, x)
    assert {g.name: g.units for g in found.groups} == {'a': 6, 'b': 5}
    for names in (('a',), ('b',), ('a', 'b')):
        keep = random_keep(found, 0.5, 0, among=set(names))
        assert gap(slim(model, found, keep)(x), masked(model, found, keep)(x)) < 1e-9, names


def test_two_norms_of_one_module_that_cannot_be_told_apart_are_coupled():
    norm = nn.LayerNorm(6, elementwise_affine=False)
    parts = dict(a=nn.Linear(3, 6), b=nn.Linear(3, 6), norm=norm, fc=nn.Linear(12, 2))
    model = randomise_(Net(lambda m, x: m.fc(torch.cat([m.norm(m.a(x)), m.norm(m.b(x))], -1)), **parts))
    found = comb(model, sample((5, 3)))
    assert {g.name: g.units for g in found.groups} == {'a': 6}
    assert members(found, 'a')['b.weight:0'] == rows(6)
    check_equal(model, found)


def test_a_norm_by_function_does_not_mask_the_norms_inside():
    """Same width, other channels: only the norm that spans the removed units leaves them out."""

    def build():
        def run(m, x):
            one = F.layer_norm(m.a(x), (m.width,), m.weight, m.bias)
            return m.fc(torch.cat([one.tanh(), m.inner(m.b(x)).tanh()], -1))

        parts = dict(a=nn.Linear(3, 6), b=nn.Linear(3, 6), inner=nn.LayerNorm(6), fc=nn.Linear(12, 2), width=6)
        weight, bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))
        return Net(run, weight=weight, bias=bias, **parts)

    model = randomise_(build())
    x = sample((5, 3))
    found = comb(model, x)
    assert {g.name: g.units for g in found.groups} == {'a': 6, 'b': 6}
    for names in (('a',), ('b',), ('a', 'b')):
        keep = random_keep(found, 0.5, 0, among=set(names))
        assert gap(slim(model, found, keep)(x), masked(model, found, keep)(x)) < 1e-9, names
