"""What a target would leave, before anything is pruned, and what each group alone is worth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.engine.preview import LayerWidth, best_units, layer_widths, preview, score_or_weigh
from mmcpd.engine.sensitivity import score_sensitivity
from mmcpd.errors import PruneError
from mmcpd.prune.selection import Floors
from mmcpd.slim import slim

FLOORS: Floors = {'min_units': 1, 'round_to': 8}


class Mixed(nn.Module):
    """Attention whose queries, keys and values are rows of one matrix, a depthwise convolution, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.place = nn.Parameter(torch.randn(1, 16, 12))
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.stem(x)).flatten(2).mT + self.place
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).reshape(len(x), 16, 3, 2, 6).permute(2, 0, 3, 1, 4)
        y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        return self.fc((x + self.out(y.transpose(1, 2).flatten(2))).mean(1))


@pytest.fixture
def combed():
    torch.manual_seed(0)
    model, images = Mixed().eval(), torch.randn(4, 3, 4, 4)
    return model, comb(model, images), images


def test_the_widths_are_those_of_the_slim_model(combed):
    model, coupling, images = combed
    found = preview(coupling, score_or_weigh(model, coupling, [images]), {'macs': 0.6, 'params': 0.7}, FLOORS)
    small = slim(model, coupling, found.keep)
    assert found.slim['params'] == sum(p.numel() for p in small.parameters()) <= 0.7 * found.dense['params']
    assert found.slim['macs'] <= 0.6 * found.dense['macs']
    widths = {each.layer: each for each in found.layers}
    assert set(widths) >= {'stem', 'qkv', 'out'} and 'fc' not in widths
    for name, each in widths.items():
        if name != 'place':
            assert each.kept == small.get_submodule(name).weight.shape[0], name
            assert each.dense == model.get_submodule(name).weight.shape[0], name
    assert any(each.kept < each.dense for each in found.layers)
    text = str(found)
    assert 'at macs=0.6 and params=0.7, units chosen by gauss_newton (on 4 pictures)' in text
    assert f'{widths["qkv"].kept / 36:.0%}' in text


def test_a_dense_keep_changes_no_width(combed):
    _, coupling, _ = combed
    assert all(each.kept == each.dense for each in layer_widths(coupling, coupling.keep()))
    keep = coupling.keep()
    keep['stem'][:3] = False
    assert LayerWidth('stem', 12, 9) in layer_widths(coupling, keep)


def test_without_pictures_the_weights_are_weighed(combed):
    model, coupling, _ = combed
    found = score_or_weigh(model, coupling, [], 'no data: data/x does not exist')
    assert (found.importance, found.why) == ('magnitude', 'no data: data/x does not exist')
    assert '(no data: data/x' in str(preview(coupling, found, {'macs': 0.6}, FLOORS))


def test_what_gauss_newton_refuses_is_weighed_and_said():
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    coupling = comb(model, torch.randn(2, 3))
    assert score_or_weigh(model, coupling, [torch.randn(2, 3)]).importance == 'gauss_newton'
    with torch.no_grad():
        model[2].weight.mul_(1e38)  # every output overflows
    cut = score_or_weigh(model, coupling, [torch.full((2, 3), 1e38)])
    assert cut.importance == 'magnitude' and cut.why.startswith('gauss_newton cannot score it: ')


def test_floors_hold_and_what_is_out_of_reach_is_refused(combed):
    model, coupling, images = combed
    scored = score_or_weigh(model, coupling, [images])
    free = preview(coupling, scored, {'macs': 0.3}, FLOORS).keep
    assert min(int(kept.sum()) for kept in free.values()) < 6
    bound = preview(coupling, scored, {'macs': 0.6}, {**FLOORS, 'remain': {'stem': 0.9}}).keep
    assert int(bound['stem'].sum()) >= 11
    with pytest.raises(PruneError, match='remain='):
        preview(coupling, scored, {'macs': 0.3}, {**FLOORS, 'remain': {'*': 0.9}})


def test_the_best_units_of_a_group_are_kept():
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0])
    assert best_units(scores, 0.5).tolist() == [True, False, False, True]
    assert best_units(scores, 0.01).tolist() == [False, False, False, True]
    assert best_units(scores, 0.01, 2).sum() == 2 and best_units(scores, 1.0).all()


def test_sensitivity_is_the_share_of_the_score_that_goes(combed):
    model, coupling, images = combed
    scores = score_or_weigh(model, coupling, [images]).scores
    found = score_sensitivity(coupling, scores, 'gauss_newton', (0.5, 0.25))
    total = sum(float(each.sum()) for each in scores.values())
    for group, each in zip(coupling.groups, found.groups, strict=True):
        ordered = scores[group.name].double().sort().values
        expected = [100 * float(ordered[: group.units - round(r * group.units)].sum()) / total for r in (0.5, 0.25)]
        assert each.values == pytest.approx(expected, rel=1e-4)
        assert each.values[1] > each.values[0]
    assert '50% kept' in str(found)
