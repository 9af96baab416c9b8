"""The safety net: what cannot follow is found, isolated and frozen with a reason one can read."""

from __future__ import annotations

import functools
import gc
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.errors import SlimError
from mmcpd.modes import InDouble
from mmcpd.slim.compare import compare, difference, moved_by_rounding
from mmcpd.slim.fault_search import Fault, search
from mmcpd.slim.trial import Outcome, in_double, random_keep, trial_of, unexplained
from tests.helpers import Net, check_equal, gap, masked, randomise_, sample

X = sample((2, 5, 3))


def by_floats(x):
    """Reshape to a width out of float arithmetic, in a function whose source no module has."""
    return x.reshape(*x.shape[:2], int(math.sqrt(64.0)))


ODD = [by_floats]  # by its own name a method could call a copy


@functools.lru_cache
def ramp(width: int):
    return torch.linspace(0, 1, width)


RAMPS: dict[int, torch.Tensor] = {}


class Cached(nn.Module):
    """A forward that keeps tables outside of the model, whose type no key names."""

    def __init__(self):
        super().__init__()
        self.before, self.fc = nn.Linear(3, 7), nn.Linear(7, 2)

    def forward(self, x):
        if 5 not in RAMPS:
            RAMPS[5] = torch.linspace(0, 1, 5)
        x = F.linear(x + ramp(3), self.before.weight) + 0 * (x.shape[-1] * RAMPS[5][:, None]).matmul(ramp(1)[None])
        return self.fc(x.tanh())


def test_what_a_forward_keeps_outside_of_the_model_stays_of_its_type():
    model = Cached()
    found = comb(model, X.float())
    assert [g.name for g in found.groups] == ['before']
    assert model(X.float()).dtype == ramp(3).dtype == torch.float32
    assert all(table.dtype == torch.float32 for table in RAMPS.values())


def test_a_fault_that_watching_hides_is_found():
    faults = search(['a', 'b', 'c'], lambda groups, watched: Fault('wrong') if 'b' in groups and not watched else None)
    assert faults == {'b': 'wrong'}


class Hidden(nn.Module):
    """Two plain layers, and one between them whose width comes out of float arithmetic, where no one can follow."""

    def __init__(self):
        super().__init__()
        self.before, self.odd, self.after, self.fc = nn.Linear(3, 7), nn.Linear(7, 8), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = ODD[0](self.odd(self.before(x).tanh()))
        return self.fc(self.after(x).tanh().mean(1))


def test_a_size_through_floats_is_frozen_and_the_rest_is_not():
    model = randomise_(Hidden())
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'before': 7, 'after': 6}
    (reason,) = {f.reason for f in found.frozen if f.tensor == 'odd.weight' and f.dim == 0}
    assert reason.startswith('a trial failed: no attribute makes 8 equal')
    check_equal(model, found)


class Wrong(nn.Module):
    """A layer that slims without a complaint, into something else: a float divided by an integer asks nobody."""

    def __init__(self):
        super().__init__()
        self.plain, self.odd, self.fc = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.odd(self.plain(x).tanh())
        return self.fc(x * (1.0 / x.shape[-1]))


class NamesFloat32(Wrong):
    """The same mistake, but a small one, in a forward that leaves float64 wherever it can."""

    def forward(self, x):
        x = x.half().to(torch.float32).type(torch.bfloat16).float()
        places = torch.arange(6, dtype=torch.float32, device=x.device) + torch.zeros(6)
        x = self.odd(self.plain(x).tanh() + places.mean())
        return self.fc(x * (1.0 + 1e-5 / x.shape[-1])).softmax(-1, dtype=torch.float32)


def test_a_small_mistake_is_found_where_float32_is_written_into_the_forward():
    """In float32 rounding would hide it."""
    found = comb(randomise_(NamesFloat32()).float(), X.float())
    assert [g.name for g in found.groups] == ['plain']
    (reason,) = {f.reason for f in found.frozen if f.tensor == 'odd.weight' and f.dim == 0}
    assert reason.startswith('a trial failed: the slimmed model differs')


def test_what_runs_in_double_computes_in_it_and_leaves_the_default_type_alone():
    model = NamesFloat32()
    twin, example = in_double(model, comb(model, X.float(), trial=False).example)
    assert example.run(twin).dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32

    def fails(model, x):
        raise ValueError(f'{torch.get_default_dtype()}')

    with pytest.raises(ValueError, match='float64'):
        InDouble(fails)(twin, X)
    assert torch.get_default_dtype() == torch.float32


def test_what_a_forward_finds_elsewhere_in_float32_meets_float64():
    boxes = torch.rand(3, 6)  # as the targets of a detector, which are no tensors of the model

    class Meets(Wrong):
        def forward(self, x):
            x = self.plain(x).flatten(0, -2)
            x = torch.cat([x, torch.cdist(x, boxes) + torch.matmul(x, other=boxes.T) + torch.mm(x, boxes.T)], 1)
            x = torch.cat([x, x[:, :6] @ boxes.T + x[:, :6].matmul(boxes.T) + F.linear(boxes[:1], x[:3, :6])], 1)
            x = torch.cat([x, torch.einsum('ni,bi->nb', x[:, :6], boxes)], 1)
            x[:3, :6] = boxes
            kept = boxes.clone()
            kept[:1] = x[:1, :6]
            spectrum = torch.fft.fft(boxes)
            assert (spectrum @ spectrum.mT).is_complex()
            return x + kept.sum()

    model = Meets()
    twin, example = in_double(model, comb(model, X.float(), trial=False).example)
    assert example.run(twin).dtype == torch.float64


def test_a_result_that_differs_is_frozen():
    model = randomise_(Wrong())
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'plain': 6}
    (reason,) = {f.reason for f in found.frozen if f.tensor == 'odd.weight' and f.dim == 0}
    assert reason.startswith('a trial failed: the slimmed model differs from the masked one by ')
    check_equal(model, found)


def many(bad: tuple[int, ...]) -> nn.Module:
    def run(m, x):
        for i, layer in enumerate(m.layers):
            x = layer(x).tanh()
            if i in bad:
                x = x * (1.0 / x.shape[-1])
        return m.fc(x)

    layers = nn.ModuleList(nn.Linear(3 if i == 0 else 6, 6) for i in range(9))
    return randomise_(Net(run, layers=layers, fc=nn.Linear(6, 2)))


@pytest.mark.parametrize('bad', [(0,), (4,), (8,), (2, 3), (0, 8), (1, 4, 6)])
def test_bisection_finds_exactly_the_groups_at_fault(bad):
    found = comb(many(bad), sample((4, 3)))
    assert {g.name for g in found.groups} == {f'layers.{i}' for i in range(9) if i not in bad}
    at_fault = {f.tensor for f in found.frozen if 'a trial failed' in f.reason}
    assert {t for t in at_fault if t.endswith('bias')} == {f'layers.{i}.bias' for i in bad}


class Chaotic(nn.Module):
    """A forward that makes 2^27 of the last bit: the logistic map."""

    def __init__(self, wrong: bool = False):
        super().__init__()
        self.plain, self.odd, self.fc, self.wrong = nn.Linear(3, 40), nn.Linear(40, 8), nn.Linear(8, 2), wrong

    def forward(self, x):
        x = self.odd(self.plain(x).tanh()).sigmoid()
        for _ in range(27):
            x = 4 * x * (1 - x)
        return self.fc(x * (1.0 / x.shape[-1]) if self.wrong else x)


@pytest.mark.parametrize('gradients', [False, True])
def test_what_rounding_explains_is_no_fault(gradients):
    model = randomise_(Chaotic())
    found = comb(model, X, trial=False)
    assert compare(model, found, random_keep(found, 0.5, 0)) > 1e-9
    assert trial_of(model, found, gradients=gradients).faults == {}


@pytest.mark.parametrize('gradients', [False, True])
def test_what_rounding_does_not_explain_is_one_beside_it(gradients):
    model = randomise_(Chaotic(wrong=True))
    found = comb(model, X, trial=False)
    assert set(trial_of(model, found, gradients=gradients).faults) == {'odd'}


class TwoOutputs(Chaotic):
    """A chaotic output, right, beside a calm one that is wrong by some 1e-4."""

    def forward(self, x):
        calm = self.odd(self.plain(x).tanh())
        return super().forward(x), self.fc(calm * (1 + 1e-3 / calm.shape[-1]))


@pytest.mark.parametrize('gradients', [False, True])
def test_chaos_of_one_output_does_not_excuse_another(gradients):
    model = randomise_(TwoOutputs())
    found = comb(model, X, trial=False)
    assert 1e-5 < compare(model, found, random_keep(found, 0.5, 0)) < 1e-2
    assert set(trial_of(model, found, gradients=gradients).faults) == {'odd'}


def test_unexplained():
    def never():
        raise AssertionError('asked without need')

    assert unexplained([], 1e-9, never) == unexplained([1e-9, 1e-12], 1e-9, never) == 0
    assert unexplained([2e-2, 1e-4], 1e-9, never) == 2e-2
    assert unexplained([1e-6, 1e-4], 1e-9, lambda: [1e-6, 0.9e-6]) == 1e-4
    assert unexplained([1e-6, 1e-4], 1e-9, lambda: [1e-6, 1.1e-6]) == 0


def test_weights_are_put_back_after_their_last_bits_were_moved():
    model = randomise_(Chaotic())
    before = [parameter.clone() for parameter in model.parameters()]
    assert moved_by_rounding(model, lambda: [model(X).detach()], difference) > 1e-9
    assert moved_by_rounding(model, lambda: [model.plain(X).detach()], difference) < 1e-14
    assert all(map(torch.equal, before, model.parameters()))


def test_faults_of_a_sound_model_are_none():
    model = many(())
    found = comb(model, sample((4, 3)), trial=False)
    assert trial_of(model, found).faults == {}
    assert len(found.groups) == 9


def test_without_the_trial_the_fault_stays_in():
    model = randomise_(Wrong())
    found = comb(model, X, trial=False)
    assert 'odd' in {g.name for g in found.groups}
    assert compare(model, found, random_keep(found, 0.5, 0)) > 1e-3
    assert set(trial_of(model, found).faults) == {'odd'}


def test_the_trial_leaves_the_model_alone():
    model = many((4,)).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    comb(model, sample((4, 3)))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert not any('forward' in vars(m) for m in model.modules())


def test_difference():
    one = torch.tensor([1.0, -4.0])
    assert difference(one, one) == 0
    assert difference(one, one + torch.tensor([0.0, 2.0])) == 0.5
    assert difference({'a': [one]}, {'a': [one * 2]}) == 1
    assert difference(one * 0, one * 0) == 0
    assert difference(one, torch.tensor([float('nan'), 1.0])) == float('inf')
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 4])) == 0.5  # the share of labels that differ
    assert difference(torch.tensor([1j]), torch.tensor([2j])) == 1
    with pytest.raises(SlimError, match=r'output shapes \[\(3,\)\], expected \[\(2,\)\]'):
        difference(one, torch.zeros(3))


def test_an_infinite_difference_is_one():
    assert difference(torch.tensor([math.inf, 1.0]), torch.ones(2)) == math.inf


def test_random_keep():
    found = comb(many(()), sample((4, 3)))
    keep = random_keep(found, 0.5, 0)
    assert {int(k.sum()) for k in keep.values()} == {3}
    assert all(torch.equal(k, random_keep(found, 0.5, 0)[n]) for n, k in keep.items())
    assert any(not torch.equal(k, random_keep(found, 0.5, 1)[n]) for n, k in keep.items())
    assert {int(k.sum()) for k in random_keep(found, 0.0, 0).values()} == {1}
    some = random_keep(found, 0.5, 0, among={'layers.3'})
    assert [n for n, k in some.items() if not bool(k.all())] == ['layers.3']
    awkward = [int(k.sum()) for k in random_keep(found, 0.5, 0, awkward=True).values()]
    assert all(n % 2 for n in awkward)
    assert set(awkward) == {3, 5}  # of 6: not 1, over which every statistic is right
    assert abs(awkward.count(3) - awkward.count(5)) <= 1


def test_an_example_of_one_element_is_enough():
    model = many((4,))
    found = comb(model, sample((1, 3)))
    assert len(found.groups) == 8
    keep = random_keep(found, 0.5, 0)
    assert gap(model(sample((4, 3))), masked(model, found, keep)(sample((4, 3)))) > 1e-5


def test_a_trial_is_held_only_where_it_can_tell_something(monkeypatch):
    tried = []
    monkeypatch.setattr('mmcpd.comb.api.trial_of', lambda model, found, **_: tried.append(found) or Outcome({}))
    plain = [nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)]
    image = sample((1, 3, 4, 4))
    comb(randomise_(nn.Sequential(*plain)), image)
    assert not tried
    comb(randomise_(nn.Sequential(*plain[:1], nn.GroupNorm(2, 6), *plain[2:])), image)
    assert len(tried) == 1
    comb(randomise_(Net(lambda m, x: m.b(m.a(x) * (m.a(x).shape[1] > 2)), a=plain[0], b=plain[3])), image)
    assert len(tried) == 2
    comb(randomise_(Hidden()), X, trial=False)
    assert len(tried) == 2


def test_a_trial_runs_each_side_once_for_each_keep_and_holds_one_copy():
    """Combing runs the model once; the trial runs a slim and a masked model twice, and no dense one."""
    alive: list[int] = []

    def run(m, x):
        alive.append(sum(type(each) is Counted for each in gc.get_objects()))
        return m.fc(m.norm(m.a(x)).tanh())

    class Counted(Net):
        pass

    model = randomise_(Counted(run, a=nn.Linear(3, 8), norm=nn.LayerNorm(8), fc=nn.Linear(8, 2)))
    gc.collect()
    assert [group.name for group in comb(model, sample((4, 3))).groups] == ['a']
    assert alive == [1, 3, 3, 3, 3]
