"""What combing reports: channels by kind of layer, where an error is, and what to do about inputs and lazy modules."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.coupling import LayerKind, Widths
from mmcpd.errors import CombError, SlimError
from mmcpd.slim import slim
from mmcpd.slim.places import raised_at


class Attention(nn.Module):
    def __init__(self, width: int, frozen: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self.frozen = nn.Linear(width, 3 * width), nn.Linear(width, width), frozen

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, 2, C // 2).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT).softmax(-1)
        if self.frozen:
            weights = weights + q.frac().mean() + k.cumprod(-1).mean() + v.flip(-1).cumprod(-1).mean()
        return x + self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


class Vision(nn.Module):
    """A patch embedding, an attention, a norm and a linear layer."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.patch, self.attn = nn.Conv2d(3, 8, 2, 2), Attention(8, frozen)
        self.norm, self.mlp, self.head = nn.LayerNorm(8), nn.Linear(8, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(self.norm(self.attn(self.patch(x).flatten(2).mT))).relu().mean(1))


IMAGES = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def widths(model: nn.Module, **options: Any) -> dict[LayerKind, tuple[int, int]]:
    torch.manual_seed(0)
    return {w.kind: (w.prunable, w.total) for w in comb(model.eval(), IMAGES, **options).widths}


def test_channels_are_counted_by_kind_of_layer() -> None:
    expected = {
        LayerKind.ATTENTION: (24, 24),
        LayerKind.CONVOLUTION: (8, 8),
        LayerKind.LINEAR: (8 + 20, 8 + 20),  # the classes are left out
        LayerKind.NORM: (8, 8),
    }
    assert widths(Vision()) == expected
    ignored = widths(Vision(), ignore='mlp')
    assert ignored == {**expected, LayerKind.LINEAR: (8, 28)}


def test_the_share_of_parameters_hides_what_the_channels_show() -> None:
    torch.manual_seed(0)
    found = comb(Vision(frozen=True).eval(), IMAGES)
    assert {w.kind: (w.prunable, w.total) for w in found.widths}[LayerKind.ATTENTION] == (0, 24)
    prunable, total = found.prunable()
    assert prunable / total > 0.9 and found.prunable_channels() == (36, 60)
    lines = str(found).splitlines()
    assert lines[0] == '2 groups, 28 units; 60 % of the units and 96 % of the parameters can be pruned'
    assert [line.split() for line in lines if line.startswith('attention')] == [['attention', '0', '24']]
    saved = json.loads(found.to_json())
    assert saved['widths'][0] == {'kind': 'attention', 'prunable': 0, 'total': 24} and 'caches' not in saved


def test_a_depthwise_convolution_and_a_net_without_groups() -> None:
    depthwise = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(216, 2))
    assert widths(depthwise) == {LayerKind.CONVOLUTION: (12, 12)}
    single = comb(nn.Linear(4, 3), torch.randn(2, 4))
    assert single.widths == () and str(single).startswith('0 groups, 0 units; 0 % of the units and 0 %')
    assert Widths(LayerKind.NORM, 1, 2) not in single.widths


# -- where it is -------------------------------------------------------------------------------------------------------
class Fixed(nn.Module):
    """Asks for a width in figures, in a function that is no method of a module."""

    def forward(self, x: Tensor) -> Tensor:
        return BY_NUMBER[0](x)


def folded(x: Tensor) -> Tensor:
    return x.view(len(x), 2, 4).flip(1).reshape(len(x), 8)


BY_NUMBER = [folded]  # a function that no method names: no number can be written into a copy of it


def blocks() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Sequential(Fixed()), nn.Linear(8, 4))


def test_slim_errors_name_module_and_source_line() -> None:
    model, x = blocks().eval(), torch.randn(2, 3)
    coupling = comb(model, x, trial=False)
    keep = coupling.keep()
    assert keep
    for kept in keep.values():
        kept[1:] = False
    line = folded.__code__.co_firstlineno + 1
    with pytest.raises(SlimError, match=rf'no attribute makes \d equal \d in 1\.0 \(test_reports\.py:{line}\)'):
        slim(model, coupling, keep)
    reasons = [reason for reason in comb(model, x).reasons() if 'trial' in reason]
    assert reasons and all(f'in 1.0 (test_reports.py:{line})' in reason for reason in reasons)


class Breaks(nn.Module):
    """Runs with all of its channels only."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x.detach().sum(0)) != 8:
            raise ValueError('eight channels')
        return x * 1.5 + x.view(-1, x.shape[1])


def test_reasons_of_a_trial_name_module_and_source_line() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ModuleDict({'inner': Breaks()})['inner'], nn.Linear(8, 4)).eval()
    found = comb(model, torch.randn(2, 3))
    line = Breaks.forward.__code__.co_firstlineno + 2
    (reason,) = (reason for reason in found.reasons() if 'trial' in reason)
    assert reason == f'a trial failed: ValueError: eight channels in 1 (test_reports.py:{line})'
    assert ('a trial failed: ValueError: eight channels in 1' in str(found)) and 'raised' not in str(found)


def test_an_error_without_a_module_has_no_place() -> None:
    try:
        raise ValueError('nothing')
    except ValueError as error:
        assert raised_at(error) == ''


def test_one_line_for_many_modules() -> None:
    model = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(8, 8), Breaks())), nn.Linear(8, 2)).eval()
    found = comb(model, torch.randn(2, 8))
    merged = [text for text, _ in found.merged_reasons() if 'trial' in text]
    assert len(merged) == 1 and merged[0].endswith(('and 2 more', 'and 1 more')), merged


# -- what to do --------------------------------------------------------------------------------------------------------
class TakesNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.b(self.a(x)) + shift


class TakesADictionary(TakesNames):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(**batch)


def test_a_dictionary_of_arguments_is_answered_with_the_cure() -> None:
    inputs: Any = {'x': torch.randn(2, 3), 'shift': torch.ones(4)}
    with pytest.raises(CombError, match=r'does not take a dictionary .*: give comb `forward=lambda') as caught:
        comb(TakesNames(), inputs)
    assert '\n' not in str(caught.value)
    cured = comb(TakesNames(), inputs, forward=lambda model, inputs: model(**inputs))
    assert [g.name for g in cured.groups] == [g.name for g in comb(TakesADictionary(), inputs).groups] == ['a']
    with pytest.raises(RuntimeError, match='must match the size') as other:  # an error of another kind is left alone
        comb(TakesNames(), (torch.randn(2, 3), torch.ones(3)))
    assert not isinstance(other.value, CombError)


@pytest.mark.parametrize('lazy', [nn.LazyConv2d(6, 3), nn.LazyBatchNorm2d()])
def test_lazy_modules_are_answered_with_the_cure(lazy: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), lazy, nn.Flatten(), nn.LazyLinear(4))
    kind = type(lazy).__name__
    with pytest.raises(CombError, match=rf'^1 \({kind}\) has no shapes yet: run the model once, then comb it$'):
        comb(model, IMAGES)
    model(IMAGES)
    assert comb(model, IMAGES).groups[0].name == '0'
