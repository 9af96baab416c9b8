"""Rotating sorts, changes nothing twice, is found out where it is wrong, and leaves all else as it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.rotate import HeadKind, Rotated, Rotations, SkippedHeads, api, heads, rotate_
from mmcpd.rotate.heads import balanced, plan
from mmcpd.rotate.observe import observe
from mmcpd.slim.compare import compare, difference
from mmcpd.slim.trial import random_keep
from tests.test_rotate.attentions import DIM, HEADS, WIDTH, Attention, Packed, built, run, tokens
from tests.test_rotate.test_left_alone import Rotary, Table

EXAMPLE = api.Example((tokens(),), api.call)


class Two(nn.Module):
    def __init__(self, second=Packed):
        super().__init__()
        self.first, self.second = Attention(), second()

    def forward(self, x):
        return self.second(self.first(x))


def carried(model: nn.Module) -> list[torch.Tensor]:
    """Return what each dimension of each head carries, `(width,)` each: the norm of its share of the product."""
    tensors = dict(model.named_parameters())
    return [
        (head.left.matrix(tensors).norm(dim=1) * head.right.matrix(tensors).norm(dim=1)).detach()
        for head in plan(observe(model, EXAMPLE)).heads
    ]


@pytest.mark.parametrize('build', [Attention, Packed])
def test_dimensions_are_sorted_by_what_they_carry(build):
    model = built(build)
    assert not all(torch.equal(c, c.sort(descending=True)[0]) for c in carried(model))
    products = [  # of what was, to compare with the best approximation there is
        head.left.matrix(tensors).T @ head.right.matrix(tensors)
        for tensors in [{n: p.detach().clone() for n, p in model.named_parameters()}]
        for head in plan(observe(model, EXAMPLE)).heads
    ]
    rotate_(model, tokens())
    assert len(products) == 2 * HEADS
    for share, product in zip(carried(model), products, strict=True):
        torch.testing.assert_close(share, torch.linalg.svdvals(product)[:WIDTH], rtol=1e-9, atol=1e-9)


def test_what_the_last_dimension_carries_is_least_for_the_output():
    model, x = built(Packed), tokens()
    out = run(model, x)
    rotate_(model, x)

    def without(index: int) -> float:
        cut = copy.deepcopy(model)
        cut.qkv.weight.data.view(3, HEADS, WIDTH, DIM)[2, :, index] = 0
        cut.qkv.bias.data.view(3, HEADS, WIDTH)[2, :, index] = 0
        return difference(out, run(cut, x))

    assert without(WIDTH - 1) < without(0) / 2


def test_a_second_time_changes_nothing():
    model = built(Two)
    before = copy.deepcopy(model.state_dict())
    rotate_(model, tokens())
    once = copy.deepcopy(model.state_dict())
    rotate_(model, tokens())
    assert all(difference(once[name], value) < 1e-9 for name, value in model.state_dict().items())
    assert difference(before['second.qkv.weight'], once['second.qkv.weight']) > 1e-2


def test_two_matrices_are_balanced_exactly_at_every_rank():
    g = torch.Generator().manual_seed(0)
    for rank, columns in ((4, 9), (2, 9), (3, 3), (1, 1)):
        left, right = (
            torch.randn(4, rank, generator=g).double() @ torch.randn(rank, n, generator=g).double()
            for n in (columns, columns + 2)
        )
        new = balanced(left, right)
        torch.testing.assert_close(new[0].T @ new[1], left.T @ right, rtol=1e-12, atol=1e-12)
        assert [tuple(t.shape) for t in new] == [(4, columns), (4, columns + 2)]
        assert difference(left.T @ right, new[0].T @ new[1].roll(1, 0)) > 1e-2


def wrong(found: heads.Plan, attention: str, kind: HeadKind) -> heads.Plan:
    """Pair one dimension of these heads with the next one's."""
    changed = [
        replace(head, right=replace(head.right, index=head.right.index.roll(1)))
        if (head.attention, head.kind) == (attention, kind)
        else head
        for head in found.heads
    ]
    return replace(found, heads=tuple(changed))


@pytest.mark.parametrize('gamma', [1.0, 0.0])
@pytest.mark.parametrize('kind', HeadKind)
def test_a_wrong_pairing_is_found_and_left_alone_also_behind_a_dead_branch(monkeypatch, kind, gamma):
    model, x = built(Two), tokens()
    model.second.gamma.data.fill_(gamma)
    model.second.qkv.weight.data.mul_(1 if gamma else 1e-3)
    monkeypatch.setattr(api, 'plan', lambda ledger: wrong(plan(ledger), 'second', kind))
    before, out = copy.deepcopy(model.state_dict()), run(model, x)
    done = rotate_(model, x)
    assert [(s.attention, s.kind, s.heads) for s in done.skipped] == [('second', kind, HEADS)]
    assert 'the outputs would differ by' in done.skipped[0].reason
    assert ('second', kind) not in {(r.attention, r.kind) for r in done.rotated}
    assert len(done.rotated) == 3
    assert difference(out, run(model, x)) < 1e-10
    rows = slice(0, 2 * HEADS * WIDTH) if kind is HeadKind.QUERY_KEY else slice(2 * HEADS * WIDTH, None)
    assert torch.equal(model.second.qkv.weight[rows], before['second.qkv.weight'][rows])


def test_a_forward_that_is_written_in_float32_is_compared_in_float32():
    class Single(Attention):
        def project(self, x):
            return [part.float() for part in super().project(x)]

    model = built(Single).float()
    x = tokens().float()
    out = run(model, x)
    assert rotate_(model, x).heads == HEADS
    assert difference(out, run(model, x)) < 1e-5


@pytest.mark.parametrize('build', [Packed, Attention, lambda: nn.TransformerEncoderLayer(DIM, 2, 8, batch_first=True)])
def test_combing_finds_the_same_groups_and_masked_stays_slimmed(build):
    model, x = built(build), tokens()

    def said():
        coupling = comb(model, x)
        gap = compare(model, coupling, random_keep(coupling, 0.5, 0, awkward=True))
        return coupling.to_json(), gap

    before, gap_before = said()
    assert rotate_(model, x).heads
    after, gap_after = said()
    assert before == after
    assert max(gap_before, gap_after) < 1e-9


def test_parameters_and_modes_stay_what_they_are():
    model = built(Two).float().train()
    model.first.eval()
    model.second.qkv.weight.requires_grad_(False)
    names = {name: (id(p), p.dtype, p.requires_grad, p.grad) for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    values = copy.deepcopy(model.state_dict())
    fast = torch.backends.mha.get_fastpath_enabled()
    rotate_(model, tokens().float())
    assert names == {name: (id(p), p.dtype, p.requires_grad, p.grad) for name, p in model.named_parameters()}
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.equal(values['second.gamma'], model.second.gamma)
    assert not torch.equal(values['second.qkv.weight'], model.second.qkv.weight)


def test_a_model_without_attention_is_left_alone():
    model = nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), nn.Linear(8, 2))
    before = copy.deepcopy(model.state_dict())
    done = rotate_(model, tokens().float())
    assert done == Rotations((), ())
    assert str(done) == 'no attention found, nothing to rotate'
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_is_written_where_a_weight_is_not_finite_or_the_forward_fails():
    model = built(Two)
    model.second.proj.weight.data[0, 0] = float('nan')
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r'^second\.proj\.weight has values that are not finite'):
        rotate_(model, tokens())
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied'):
        rotate_(model, tokens(DIM + 1))
    assert all(torch.equal(v.nan_to_num(), before[n].nan_to_num()) for n, v in model.state_dict().items())


def test_a_forward_of_its_own_may_be_given():
    model, x = built(Two), tokens()
    done = rotate_(model, (x, 2.0), forward=lambda model, x, factor: model.first(x * factor))
    assert {r.attention for r in done.rotated} == {'first'}


def test_the_report_says_what_was_rotated_and_why_the_rest_was_not():
    done = rotate_(built(lambda: Two(Rotary)), tokens())
    assert str(done).splitlines() == [
        'rotated 6 heads of 2 attentions',
        'left alone: query and key of 3 heads: a factor for each channel or position (rotary embeddings, a gate) '
        '(second)',
    ]
    assert done.heads == done.found == 2 * HEADS
    assert done.rotated[0] == Rotated('first', HeadKind.QUERY_KEY, ('first.k.weight', 'first.q.weight'), HEADS, WIDTH)
    assert [(s.attention, s.heads) for s in done.skipped] == [('second', HEADS)]


def test_one_line_of_the_report_stands_for_many_attentions():
    same = [SkippedHeads(f'layers.{n}', HeadKind.QUERY_KEY, 4, f'a norm in layers.{n}.norm') for n in range(3)]
    done = Rotations((), tuple(same))
    assert str(done).splitlines() == [
        'rotated 0 heads of 0 attentions',
        'left alone: query and key of 12 heads: a norm (layers.0 and 2 more)',
    ]
    assert (done.heads, done.found) == (0, 12)


def test_a_table_of_positions_is_named():
    assert 'a sum (a position table, a residual)' in str(rotate_(built(Table), tokens()))
