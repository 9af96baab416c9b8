"""Regions of a picture, places that an index says, products with sparse matrices: each with nets of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import DeformConv2d, ps_roi_align, ps_roi_pool, roi_align, roi_pool

from mmcpd.comb import comb
from mmcpd.comb.rules import UNTAGGED
from mmcpd.comb.rules.table import OPERATIONS
from tests.exact import exact
from tests.helpers import Net, randomise_, sample

X, TOKENS, VOLUME = sample((2, 3, 8, 8)), sample((2, 5, 3)), sample((1, 3, 6, 6, 6))
BOXES = torch.tensor([[0, 0.0, 0, 5, 5], [1, 1, 1, 7, 6]], dtype=torch.float64)
PLACES = torch.tensor([0, 2, 1, 2, 0])
SOME = torch.tensor([True, False, True, False, True])
SPARSE = torch.eye(5, dtype=torch.float64).roll(1, 0) + 0.3 * torch.eye(5, dtype=torch.float64)


def conv(inside: int, outside: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, kernel, padding=kernel // 2)


def pictures(run, **parts) -> Net:
    return Net(run, a=conv(3, 8), **parts)


def unpooled(m, x):
    y, where = F.max_pool2d(m.a(x), 2, return_indices=True)
    return m.b(F.max_unpool2d(m.c(y), where, 2))


def per_level(m, x):
    levels = [m.a(x), F.avg_pool2d(m.a(x), 2)]
    rois = [roi_align(level, BOXES, (2, 2), 1 / 2**i, aligned=True) for i, level in enumerate(levels)]
    return m.fc(torch.cat(rois, 1).flatten(1))


def offsets(m, x):
    y = m.a(x)
    return m.b(m.d(y, m.off(y)))


def modulated(m, x):
    y = m.a(x).relu()
    return m.b(m.d(y, m.off(y), m.mk(y).sigmoid()))


REGIONS = {
    'boxes, flattened': (pictures(lambda m, x: m.fc(roi_align(m.a(x).relu(), BOXES, 3).flatten(1)),
                                  fc=nn.Linear(72, 2)), {'a': 8}),
    'boxes, of two levels': (pictures(per_level, fc=nn.Linear(64, 2)), {'a': 8}),
    'largest in boxes': (pictures(lambda m, x: m.b(roi_pool(m.a(x), BOXES, 4).tanh()), b=conv(8, 2)), {'a': 8}),
    'a list of boxes': (pictures(lambda m, x: m.b(roi_align(m.a(x), [BOXES[:1, 1:], BOXES[1:, 1:]], 2)),
                                 b=conv(8, 2)), {'a': 8}),
    'cells, aligned': (pictures(lambda m, x: m.b(ps_roi_align(m.a(x), BOXES, 2)), b=conv(2, 2)), {'a': 2}),
    'cells, pooled': (Net(lambda m, x: m.b(ps_roi_pool(m.a(x), BOXES, 2)), a=conv(3, 24), b=conv(6, 2)), {'a': 6}),
    'cells of the stem': (Net(lambda m, x: m.b(ps_roi_align(m.a(m.s(x)), BOXES, 3).relu()), s=conv(3, 5),
                              a=conv(5, 36), b=conv(4, 2)), {'s': 5, 'a': 4}),
    'deformed': (pictures(offsets, off=conv(8, 18), d=DeformConv2d(8, 6, 3, padding=1), b=conv(6, 2)),
                 {'a': 8, 'd': 6}),
    'deformed, in two parts': (pictures(modulated, off=conv(8, 36), mk=conv(8, 18),
                                        d=DeformConv2d(8, 6, 3, padding=1, bias=False), b=conv(6, 2)),
                               {'a': 4, 'd': 6}),
    'deformed, in groups': (pictures(modulated, off=conv(8, 18), mk=conv(8, 9),
                                     d=DeformConv2d(8, 6, 3, padding=1, groups=2), b=conv(6, 2)), {'a': 2}),
    'unpooled': (pictures(lambda m, x: m.b(F.max_unpool2d(*F.max_pool2d(m.a(x), 2, return_indices=True), 2)),
                          b=conv(8, 2)), {'a': 8}),
    'unpooled, other values': (pictures(unpooled, c=conv(8, 8), b=conv(8, 2)), {'a': 8}),
    'unpooled, squared': (pictures(lambda m, x: m.b(F.max_unpool2d(
        *F.max_pool2d(m.a(x), 2, return_indices=True), 2).square()), b=conv(8, 2)), {'a': 8}),
}  # fmt: skip


@pytest.mark.parametrize('name', REGIONS)
def test_regions(name):
    exact(REGIONS[name][0], X, REGIONS[name][1])


@pytest.mark.parametrize('mode', ['nearest', 'nearest-exact', 'trilinear', 'reflect', 'replicate'])
def test_volumes(mode):
    def run(m, x):
        y = m.a(x)
        y = (
            F.pad(y, (1,) * 6, mode)
            if mode in ('reflect', 'replicate')
            else F.interpolate(y, scale_factor=2, mode=mode)
        )
        return m.b(y)

    exact(Net(run, a=nn.Conv3d(3, 6, 3), b=nn.Conv3d(6, 2, 3)), VOLUME, {'a': 6})


class Tokens(nn.Module):
    """Something that is done to eight channels of five tokens."""

    def __init__(self, change) -> None:
        super().__init__()
        self.a, self.b, self.change, self.dim = nn.Linear(3, 8), nn.Linear(8, 2), change, 8
        self.token, self.size = nn.Parameter(torch.rand(8)), (2, 2)

    def forward(self, x):
        return self.b(self.change(self, self.a(x)))


def written(m, y):
    out = torch.zeros(2, 7, m.dim, dtype=y.dtype)
    out[:, [0, 2, 4, 5, 6]] = y
    return out


def with_token(m, y):
    y = y.clone()
    y[SOME.expand(2, -1)] = m.token
    return y


def best(m, y):
    places = y.sum(-1).topk(3, dim=1).indices
    return y.gather(1, places[..., None].expand(-1, -1, m.dim))


def best_by_score(m, y):
    score, order = (y @ m.token).sort(1, descending=True)
    return torch.take_along_dim(y, order[:, :2, None], 1) * score[:, :2, None].sigmoid()


def places_of(m, y):
    rows, columns = (y.square().sum(-1) > 0.1).nonzero(as_tuple=True)
    return y[rows, columns]


def by_level(m, y):
    """Write pictures (N, C, 2, 2) of two levels, one of them empty, into one tensor, as pooling by levels does."""
    pictures = y[0, :, :, None, None].expand(-1, -1, 2, 2) * torch.ones(2, 2, dtype=y.dtype)
    result = torch.zeros((5, y.shape[-1], *m.size), dtype=y.dtype)
    for level in (torch.arange(5), torch.arange(0)):
        result[level] = pictures[level]
    return result


CHANGES = {
    'scatter_add': lambda m, y: y.new_zeros(2, 3, m.dim).scatter_add(1, PLACES[None, :, None].expand(2, -1, m.dim), y),
    'scatter': lambda m, y: torch.zeros(2, 3, y.shape[-1], dtype=y.dtype).scatter_(
        1, PLACES[None, :, None].expand(2, 5, y.shape[-1]), y),
    'scatter of a number': lambda m, y: y.scatter(1, PLACES[None, :2, None].expand(2, -1, m.dim), 0.0),
    'scatter_reduce': lambda m, y: torch.zeros_like(y).scatter_reduce(
        1, PLACES[None, :, None].expand_as(y), y, 'amax'),
    'index_add': lambda m, y: torch.zeros(2, 3, m.dim, dtype=y.dtype).index_add(1, PLACES, y),
    'index_copy': lambda m, y: torch.zeros(2, 7, m.dim, dtype=y.dtype).index_copy(1, PLACES + 1, y.cos()),
    'index_fill': lambda m, y: y.index_fill(1, PLACES[:2], 0.5),
    'index_put': lambda m, y: torch.zeros(2, 3, m.dim, dtype=y.dtype).index_put(
        (torch.tensor([0, 1]), torch.tensor([2, 0])), y[:, 0]),
    'index_put, added': lambda m, y: y.index_put((torch.tensor([0, 1]), PLACES[:2]), y[:, 3], accumulate=True),
    'index_put, of pictures by level': lambda m, y: by_level(m, y).flatten(2).mean(-1)[None],
    'written': written,
    'a token for masked ones': with_token,
    'masked_fill': lambda m, y: y.masked_fill(SOME[None, :, None], 0.0),
    'masked_fill, then a sum': lambda m, y: y * y.masked_fill(y > 0.6, 0.0).sum(-1, keepdim=True),
    'masked_fill with a number, then a sum': lambda m, y: y * y.masked_fill(y > 0.1, 0.3).sum(-1, keepdim=True),
    'masked_fill of channels, then a mean': lambda m, y: y * y.masked_fill(y < 0.1, 0.0).mean(-1, keepdim=True),
    'where': lambda m, y: y * torch.where(y > 0.1, y, 0.0).sum(-1, keepdim=True),
    'where, of a number': lambda m, y: y * torch.where(y > 0.1, y, 0.3).sum(-1, keepdim=True),
    'where, of two': lambda m, y: y * torch.where(SOME[:, None], y, y.sin()).sum(-1, keepdim=True),
    'topk of tokens': best,
    'topk of each channel': lambda m, y: y.topk(3, dim=1)[0],
    'sorted tokens': best_by_score,
    'nonzero': places_of,
    'sparse.mm': lambda m, y: torch.stack([torch.sparse.mm(SPARSE.to_sparse(), each) for each in y]),
    'sparse @': lambda m, y: torch.stack([SPARSE.to_sparse() @ each for each in y.cos()]),
    'sparse.addmm': lambda m, y: torch.stack([torch.sparse.addmm(each, SPARSE.to_sparse(), each) for each in y]),
    'rrelu': lambda m, y: F.rrelu(y),
}  # fmt: skip


@pytest.mark.parametrize('name', CHANGES)
def test_tokens(name):
    exact(Tokens(CHANGES[name]), TOKENS, {'a': 8})


FREEZING = {
    'nonzero channels': (lambda m, y: y + (y > 0.1).nonzero().shape[0], 'choose positions'),
    'masked channels': (lambda m, y: y * y.masked_select(y > 0.1).sum(), 'choose positions'),
    'written along channels': (lambda m, y: y.index_fill(2, PLACES[:2], 0.5), 'written to by a fixed index'),
    'scattered along channels': (lambda m, y: y.scatter(2, PLACES.expand(2, 1, 5), 0.5), 'written to by a fixed index'),
    'put along channels': (lambda m, y: y.index_put((torch.tensor([0]), torch.tensor([1]), torch.tensor([3])), y.sum()),
                           'written to by a fixed index'),
}  # fmt: skip


@pytest.mark.parametrize('name', FREEZING)
def test_what_depends_on_the_positions_of_channels_stays(name):
    change, reason = FREEZING[name]
    found = comb(randomise_(Tokens(change)), TOKENS, trial=False)
    assert not found.groups
    assert not found.unsupported
    assert any(reason in why for why in found.reasons())


def test_activations_are_point_wise_by_name_where_torch_does_not_tag_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('torch.Tag.pointwise', torch.Tag.core)  # which none of them has
    for name in ('softshrink', 'hardshrink', 'threshold', 'square', 'selu', 'logaddexp'):
        exact(Tokens(lambda m, y, name=name: ACTIVATIONS[name](y)), TOKENS, {'a': 8})
    monkeypatch.setattr('mmcpd.comb.rules.UNTAGGED', frozenset())
    assert not comb(randomise_(Tokens(lambda m, y: F.softshrink(y))), TOKENS, trial=False).groups


ACTIVATIONS = {
    'softshrink': F.softshrink,
    'hardshrink': F.hardshrink,
    'threshold': lambda y: F.threshold(y, 0.1, 0.2),
    'square': torch.square,
    'selu': F.selu,
    'logaddexp': lambda y: torch.logaddexp(y, y.cos()),
}


def test_each_name_is_an_operator_without_a_row():
    assert not UNTAGGED & OPERATIONS.keys()
    unknown = {name for name in UNTAGGED if not hasattr(torch.ops.aten, name)}
    assert not unknown


def test_channels_of_a_picture_that_a_linear_layer_draws_are_pooled_by_boxes():
    boxes = [torch.tensor([[1.0, 2.0, 6.0, 7.0]]).double()] * 3
    net = Net(lambda m, x: m.fc(m.mix(roi_align(m.draw(x).relu().view(-1, m.channels, 8, 8), boxes, 3)).flatten(1)),
              draw=nn.Linear(5, 7 * 64), mix=nn.Conv2d(7, 5, 3), fc=nn.Linear(5, 2), channels=7)  # fmt: skip
    exact(net, sample((3, 5)), {'draw': 7, 'mix': 5})
