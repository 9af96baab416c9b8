"""Copies that a call makes are gone when it ends: their memory does not wait for the garbage collector."""

from __future__ import annotations

import copy
import gc
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.nested import tensors_in
from mmcpd.rotate import rotate_
from mmcpd.slim import mask_
from mmcpd.slim.compare import compare, compare_gradients
from mmcpd.slim.copying import copied, discarding
from mmcpd.slim.trial import disagreement, in_double, random_keep

TOKENS = torch.rand(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Attends(nn.Module):
    """An attention behind a norm over channels, which masking patches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(16, 12), nn.LayerNorm(12)
        self.qkv, self.last = nn.Linear(12, 48), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(self.first(x))).view(*x.shape[:2], 3, 16).unbind(2)
        return self.last((q @ k.transpose(1, 2) / 4).softmax(-1) @ v)


class Hooked(Attends):
    """Its hook is a method of its own, as vision transformers have: a cycle in the model itself."""

    def __init__(self) -> None:
        super().__init__()
        if hasattr(self, 'register_load_state_dict_pre_hook'):  # since torch 2.5
            self.register_load_state_dict_pre_hook(Hooked.before_loading)
        self._register_load_state_dict_pre_hook(self.before_loading)

    def before_loading(self, *_: object) -> None:
        pass


class Parents(Attends):
    """A child knows its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.first.parent = [self]


class Fails(Hooked):
    """Has groups that fail a trial, each in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 10), nn.Linear(10, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if len(y[0, 0].tolist()) != 10:
            raise ValueError('not ten')
        return super().forward(x + self.b(y))


class Single(Hooked):
    """Does not run in float64."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise TypeError('no float64')
        return super().forward(x)


NETS = [Attends, Hooked, Parents, Fails, Single]


@contextmanager
def without_collector():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alive(*kinds: type) -> set[int]:
    """Return the identities of all modules, and of all objects of these kinds."""
    return {id(each) for each in gc.get_objects() if issubclass(type(each), (nn.Module, *kinds))}


USES = {
    'compare': lambda m, c, k: compare(m, c, k),
    'compare gradients': lambda m, c, k: compare_gradients(m, c, k),
    'another forward': lambda m, c, k: disagreement(m, c, lambda net, x: net(x)),
    'a forward that fails': lambda m, c, k: disagreement(m, c, lambda net, x: net(x).view(2, 5, 16, 48)),
    'rotate': lambda m, c, k: rotate_(m, TOKENS) and None,
}


@pytest.mark.parametrize('build', NETS)
@pytest.mark.parametrize('use', USES)
def test_nothing_is_left_when_a_call_ends(build, use):
    model = build().eval()
    coupling = comb(model, TOKENS)
    keep = random_keep(coupling, 0.6, 0)
    assert coupling.groups and coupling.fixes.statistics  # masking patches forwards
    USES[use](model, coupling, keep)  # what is made once
    with without_collector():
        before = alive(Tensor, nn.Parameter)
        USES[use](model, coupling, keep)
        assert not alive(Tensor, nn.Parameter) - before
        twin = copied(model)
        mask_(twin, coupling, keep)
        del twin
        assert alive(nn.Parameter) - before  # such a copy stays, so that the test can fail


@pytest.mark.parametrize('build', NETS)
def test_combing_leaves_no_copy(build):
    model = build().eval()
    comb(model, TOKENS)
    with without_collector():
        before = alive(nn.Parameter)
        coupling = comb(model, TOKENS)
        assert not alive(nn.Parameter) - before
    assert coupling.groups and (build is not Fails or 'not ten' in str(coupling.reasons()) or 'a' not in coupling.start)


@pytest.mark.parametrize('build', [Hooked, Single])
def test_a_twin_that_does_not_run_in_float64_is_gone(build):
    model = build().eval()
    coupling = comb(model, TOKENS)
    with without_collector():
        before = alive(nn.Parameter)
        twin, _ = in_double(model, coupling.example)
        assert len(alive(nn.Parameter) - before) == len(list(twin.parameters())) + len(list(twin.modules()))


def test_what_belongs_to_the_model_itself_is_not_emptied():
    class Shared(nn.Linear):
        def __deepcopy__(self, memo: object) -> nn.Module:
            return self

    model = nn.Sequential(nn.Linear(4, 4), Shared(4, 4))
    with discarding(model) as copies:
        copies.append(twin := copy.deepcopy(model))
    assert not vars(twin) and model[1].weight.shape == (4, 4) and model(torch.ones(4)).shape == (4,)


def test_a_list_of_tensors_does_not_keep_them():
    with without_collector():
        before = alive(Tensor)
        tensors_in([torch.ones(1), {'a': torch.ones(1)}])
        assert not alive(Tensor) - before
