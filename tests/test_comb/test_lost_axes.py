"""Tensors that become other objects, leave torch, or are read by nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.comb.storages import Storages
from mmcpd.errors import CombError, SlimError
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep
from tests.helpers import TORCH_2_5, check_equal, randomise_, sample


class Picture(Tensor):
    """A subclass, as data libraries make of their pictures."""


class Net(nn.Module):
    """Three convolutions and a linear layer; `between` handles what goes from the second to the third."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 10, 3)
        self.fc, self.between = nn.Linear(10, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(self.between(self.b(self.a(x)).relu())).mean((2, 3)))


def net(between: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net(between).double().eval(), torch.randn(2, 3, 9, 9, dtype=torch.float64)


OTHER_OBJECTS: dict[str, Callable[[Tensor], Tensor]] = {
    'the same': lambda x: x,
    'a parameter': nn.Parameter,
    'a view of a parameter': lambda x: nn.Parameter(x.flatten(2)).unflatten(2, (5, 5)),
    'data': lambda x: x.data,
    'a deep copy': lambda x: copy.deepcopy(x.detach()),
}
if TORCH_2_5:  # earlier a tensor could not become one of a subclass while it is observed
    OTHER_OBJECTS |= {
        'a buffer': nn.Buffer,
        'a subclass': lambda x: x.as_subclass(Picture),
        'a subclass and back': lambda x: (x.as_subclass(Picture) * 2).as_subclass(Tensor),
    }
LEFT_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    'numpy': lambda x: torch.from_numpy(x.detach().numpy() * 2),
    '__array__': lambda x: torch.as_tensor(np.maximum(np.asarray(x.detach()), 0)),
    'tolist': lambda x: torch.tensor(x.tolist(), dtype=x.dtype),
}


@pytest.mark.parametrize('how', OTHER_OBJECTS)
def test_axes_follow_a_tensor_into_other_objects(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(OTHER_OBJECTS[how])
    coupling = comb(model, x, trial=False)
    assert [group.name for group in coupling.groups] == ['a', 'b', 'c']
    assert compare(model, coupling, random_keep(coupling, 0.5, 0)) < 1e-12


def test_without_memory_the_axes_of_other_objects_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Storages, 'find', lambda self, tensor: None)
    model, x = net(nn.Parameter)
    assert [group.name for group in comb(model, x, trial=False).groups] == ['a', 'c']


@pytest.mark.skipif(not TORCH_2_5, reason='torch 2.4 makes no tensor of a subclass while it is observed')
def test_an_example_may_be_of_a_subclass() -> None:
    model, x = net(lambda x: x)
    plain = comb(model, x)
    coupling = comb(model, x.as_subclass(Picture))
    assert [group.name for group in coupling.groups] == [group.name for group in plain.groups]
    assert compare(model, coupling, random_keep(coupling, 0.5, 0)) < 1e-12


@pytest.mark.parametrize('how', LEFT_TORCH)
def test_what_leaves_torch_is_frozen(how: str) -> None:
    model, x = net(LEFT_TORCH[how])
    coupling = comb(model, x, trial=False)
    assert [group.name for group in coupling.groups] == ['a', 'c']
    assert f'its values leave torch by {how} in the model itself' in {frozen.reason for frozen in coupling.frozen}
    assert compare(model, coupling, random_keep(coupling, 0.5, 0)) < 1e-12


class TwoHeads(nn.Module):
    """The second output is made by a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.trunk, self.side = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(8, 5, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x).relu()
        return self.fc(self.trunk(x).mean((2, 3))), self.side(x)


def test_an_output_that_the_forward_drops_keeps_its_channels() -> None:
    torch.manual_seed(0)
    model, x = TwoHeads().double().eval(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    coupling = comb(model, x, forward=lambda model, x: model(x)[0])
    assert [group.name for group in coupling.groups] == ['stem', 'trunk']
    [reason] = {frozen.reason for frozen in coupling.frozen if frozen.tensor == 'side.weight' and frozen.dim == 0}
    assert reason.startswith('nothing that ran reads it: it goes into an output that `forward=` drops')
    assert compare(model, coupling, random_keep(coupling, 0.5, 0)) < 1e-12


class Sums(nn.Module):
    """Channels that no layer reads, but a sum, a norm or a product of two activations."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.read = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.b(self.a(x)))


@pytest.mark.parametrize(
    'read',
    (
        lambda x: x.sum(1),
        lambda x: x.norm(dim=1),
        lambda x: x.flatten(2).mT @ x.flatten(2),
        lambda x: torch.cosine_similarity(x[..., :1, :1], x, dim=1),
        lambda x: x.mean((1, 2, 3)),
    ),
)
def test_sums_and_products_read_too(read: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Sums(read).double().eval(), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    coupling = comb(model, x)
    assert [group.name for group in coupling.groups] == ['a', 'b']
    assert compare(model, coupling, random_keep(coupling, 0.5, 0)) < 1e-12


def test_a_slim_model_that_lost_an_axis_would_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mmcpd.comb.size_arguments.LEAVING', set())
    monkeypatch.setattr('mmcpd.comb.grouping._require_reader', lambda *_: None)
    model, x = net(LEFT_TORCH['numpy'])
    coupling = comb(model, x, trial=False)
    assert [group.name for group in coupling.groups] == ['a', 'b', 'c']
    with pytest.raises((RuntimeError, SlimError)):
        compare(model, coupling, random_keep(coupling, 0.5, 0))


def filled(sizes: Callable[[Tensor], list[int]]) -> Callable[[Tensor], Tensor]:
    def between(x: Tensor) -> Tensor:
        return x.new_empty(sizes(x)).copy_(x)

    return between


def test_an_empty_tensor_is_what_fills_it() -> None:
    """As the outputs of compiled operators are: made first, by sizes through `int`, and then written."""
    model, x = net(filled(lambda x: [int(size) for size in x.shape]))
    found = comb(model, (x,), trial=False)
    assert {g.name: g.units for g in found.groups} == {'a': 8, 'b': 12, 'c': 10}
    keep = random_keep(found, 0.5, 0, awkward=True)
    assert compare(model, found, keep) < 1e-12
    model, x = net(filled(lambda x: list(map(int, '2 12 5 5'.split()))))  # sizes that stay
    assert {g.name for g in comb(model, (x,)).groups} == {'a', 'c'}


def into_part(x: Tensor) -> Tensor:
    table = x.new_zeros([int(size) for size in x.shape])
    return torch.cat([x, table.narrow(1, 0, 12).narrow(2, 0, 2).copy_(x.narrow(2, 0, 2))], 2)


def beside_a_view(x: Tensor) -> Tensor:
    table = x.new_empty([int(size) for size in x.shape])
    head = table.narrow(1, 0, 4)
    table.copy_(x)
    return x * head.mean(1, keepdim=True)


def into_a_view(x: Tensor) -> Tensor:
    table = x.new_empty([math.prod(map(int, x.shape))])
    table.view([int(size) for size in x.shape]).copy_(x)
    return x * table.mean()


@pytest.mark.parametrize('between', [into_part, beside_a_view, into_a_view])
def test_a_copy_into_memory_that_others_see_is_no_new_tensor(between: Callable[[Tensor], Tensor]) -> None:
    model, x = net(between)
    found = comb(model, (x,), trial=False)
    assert {g.name for g in found.groups} == {'a', 'c'}


def test_a_copy_into_an_input_is_no_new_tensor() -> None:
    class IntoInput(Net):
        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            return super().forward(x) + state.copy_(self.b(self.a(x))).mean()

    model, x = IntoInput(nn.Identity()).double().eval(), torch.randn(2, 3, 9, 9).double()
    found = comb(model, (x, torch.zeros(2, 12, 5, 5).double()), trial=False)
    assert {g.name for g in found.groups} == {'a', 'c'}


class ByVmap(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.then(self.a(x).relu())

    def then(self, y):
        return torch.vmap(self.b)(y)


class ByJacobian(ByVmap):
    def then(self, y):
        return self.b(y) + torch.func.jacrev(lambda each: self.b(each).sum())(y).mean()


class Nested(ByVmap):
    def then(self, y):
        return self.b(torch.nested.nested_tensor(list(y.unbind(0))).to_padded_tensor(0.0))


@pytest.mark.filterwarnings('ignore:The PyTorch API of nested tensors')
@pytest.mark.parametrize('kind', [ByVmap, ByJacobian, Nested])
def test_tensors_that_stand_for_others_are_refused_in_one_line(kind):
    with pytest.raises(CombError, match='where nothing can be observed; give comb a `forward=` that goes without'):
        comb(kind(), torch.rand(2, 4, 3))


def test_vmap_over_what_holds_no_layer_is_observed():
    class Doubled(ByVmap):
        def then(self, y):
            return self.b(torch.vmap(lambda each: each * 2)(y))

    model = randomise_(Doubled())
    check_equal(model, comb(model, sample((2, 4, 3))))
