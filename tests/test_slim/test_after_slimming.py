"""What other methods than the forward read of a slim model: sizes from which they build or fuse layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.coupling import Keep
from mmcpd.slim import mask_, slim
from mmcpd.slim.compare import compare
from mmcpd.slim.methods import Methods, reads_of
from mmcpd.slim.shape_attributes import Layer, followed
from mmcpd.slim.trial import random_keep

EXACT = 1e-12


def fused(conv: nn.Conv2d, norm: nn.BatchNorm2d, size: int = 3) -> tuple[Tensor, Tensor]:
    """Return kernel and bias of a convolution and the batch norm behind it."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
    kernel = nn.functional.pad(conv.weight, [(size - conv.kernel_size[0]) // 2] * 4)
    return kernel * scale[:, None, None, None], norm.bias - norm.running_mean * scale  # type: ignore[operator]


class Branches(nn.Module):
    """Two convolutions and an identity with batch norms, merged into one by `reparameterize`, as timm names things."""

    def __init__(self, in_chs: int, out_chs: int, groups: int = 1) -> None:
        super().__init__()
        self.in_chs, self.out_chs, self.groups = in_chs, out_chs, groups
        self.conv3, self.bn3 = self.branch(3)
        self.conv1, self.bn1 = self.branch(1)
        self.identity = nn.BatchNorm2d(in_chs) if in_chs == out_chs else None
        self.reparam: nn.Conv2d | None = None

    def branch(self, size: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        conv = nn.Conv2d(self.in_chs, self.out_chs, size, padding=size // 2, groups=self.groups, bias=False)
        return conv, nn.BatchNorm2d(self.out_chs)

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam is not None:
            return self.reparam(x).relu()
        y = self.bn3(self.conv3(x)) + self.bn1(self.conv1(x))
        return (y if self.identity is None else y + self.identity(x)).relu()

    def reparameterize(self) -> None:
        self.reparam = nn.Conv2d(self.in_chs, self.out_chs, 3, padding=1, groups=self.groups, dtype=torch.float64)
        parts = [fused(self.conv3, self.bn3), fused(self.conv1, self.bn1)]
        if self.identity is not None:
            own = nn.Conv2d(self.in_chs, self.in_chs, 1, groups=self.groups, bias=False, dtype=torch.float64)
            own.weight.data.zero_()
            for i in range(self.in_chs):
                own.weight.data[i, i % (self.in_chs // self.groups)] = 1
            parts.append(fused(own, self.identity))
        self.reparam.weight.data = torch.stack([kernel for kernel, _ in parts]).sum(0)
        self.reparam.bias.data = torch.stack([bias for _, bias in parts]).sum(0)  # type: ignore[union-attr]


class Bottleneck(nn.Module):
    """Says its widths in other words, in a tuple too, and makes one linear layer of two by `merge`."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.embed_dims, self.hidden_dim, self.sizes_of_planes = width, hidden, (width, out)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, out)
        self.merged: nn.Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x)) if self.merged is None else self.merged(x)

    def merge(self) -> None:
        assert self.hidden_dim == self.fc1.weight.shape[0]
        self.merged = nn.Linear(self.embed_dims, self.sizes_of_planes[1], dtype=torch.float64)
        self.merged.weight.data = self.fc2.weight @ self.fc1.weight
        self.merged.bias.data = self.fc2(self.fc1.bias)


class Reparam(nn.Module):
    """Branches with and without an identity, and depth-wise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layers = nn.Sequential(Branches(8, 12), Branches(12, 12), Branches(12, 12, 12), Branches(12, 10))
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))

    def deploy(self) -> None:
        for layer in self.layers:
            layer.reparameterize()  # type: ignore[operator]


class Merging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(6, 16), nn.Sequential(Bottleneck(16, 24, 20), Bottleneck(20, 9, 11))
        self.fc = nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.stem(x)))

    def deploy(self) -> None:
        for layer in self.layers:
            layer.merge()  # type: ignore[operator]


@torch.no_grad()
def alive_(model: nn.Module) -> nn.Module:
    """Let every value of the norms matter."""
    model.double().eval()  # which returns nothing in OpenMMLab's backbones
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var, module.bias, module.running_mean):
                tensor.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model


def check_deploy(build: Callable[[], Any], x: Tensor, deploy: Callable[[Any], object]) -> tuple[Any, Keep]:
    """Check that masked and slim agree before and after a method that reads the sizes of their blocks."""
    torch.manual_seed(0)
    model = alive_(build())
    coupling = comb(model, x)
    keep = random_keep(coupling, 0.5, 0, awkward=True)
    small, other = slim(model, coupling, keep), slim(model, coupling, {n: kept.roll(1) for n, kept in keep.items()})
    assert compare(model, coupling, keep, small) < EXACT
    mask_(model, coupling, keep)
    for each in (model, small, other):
        deploy(each)
    with torch.no_grad():
        expected, got, wrong = (
            [*out][-1] if isinstance(out, tuple) else out for out in (m(x) for m in (model, small, other))
        )
    scale = float(expected.abs().max())
    assert float((expected - got).abs().max()) < EXACT * scale
    assert float((expected - wrong).abs().max()) > 1e-6 * scale
    return small, keep


@pytest.mark.parametrize('build', [Reparam, Merging])
def test_blocks_are_merged_after_slimming(build: type[nn.Module]) -> None:
    shape = (2, 3, 9, 9) if build is Reparam else (5, 6)
    small, keep = check_deploy(build, torch.randn(shape, dtype=torch.float64), lambda model: model.deploy())
    if build is Merging:
        block = small.layers[0]
        assert block.hidden_dim == int(keep['layers.0.fc1'].sum()) < 24
        assert block.sizes_of_planes == (block.embed_dims, int(keep['layers.0.fc2'].sum()))


@pytest.mark.parametrize(('name', 'arch'), [('RepVGG', 'A0'), ('MobileOne', 's0')])
def test_mmpretrain_models_switch_to_deploy(name: str, arch: str) -> None:
    backbones = pytest.importorskip('mmpretrain.models.backbones')
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    check_deploy(lambda: getattr(backbones, name)(arch), x, lambda model: model.switch_to_deploy())


class Torso(nn.Module):
    """A net of one block that has a number beside its layers, which other methods read or not."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.a, self.block, self.c = nn.Conv2d(3, 8, 3), block, nn.Conv2d(8, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.block(self.a(x).relu()))


class Block(nn.Module):
    """Two convolutions of 8 channels each."""

    def __init__(self, **numbers: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        vars(self).update(numbers)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Branching(Block):
    """Its forward compares two numbers, which differ only in the slim model."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * 2 if self.in_channels == self.out_channels else y

    def fuse(self) -> int:
        return int(self.in_channels)


class Unclear(Block):
    def fuse(self) -> Tensor:
        return torch.zeros(self.width)


def slimmed(block: nn.Module) -> Any:
    torch.manual_seed(0)
    model, x = Torso(block).double().eval(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    coupling = comb(model, x)
    keep = coupling.keep()
    for kept, count in zip(keep.values(), (5, 6, 7), strict=True):
        kept[count:] = False
    small = slim(model, coupling, keep)
    assert compare(model, coupling, keep, small) < EXACT
    return small.block


def test_names_tell_which_of_equal_widths_is_meant() -> None:
    names = {'in_channels': 5, 'kernel': 8, 'num_heads': 8, 'classes': 8, 'groups': 8, 'dim': 2, 'stage_width': 8}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        block = slimmed(Block(in_channels=8, kernel=8, num_heads=8, classes=8, groups=8, dim=2, stage_width=8))
    # Both convolutions have inputs of eight, of 5 and 6: only what is clear follows.
    assert {name: getattr(block, name) for name in names} == {**names, 'in_channels': 8}


def test_a_number_that_the_forward_compares_stays() -> None:
    with pytest.warns(UserWarning, match=r'which width block\.in_channels is, which fuse\(\) reads: call it before'):
        block = slimmed(Branching(in_channels=8, out_channels=8))
    assert block.in_channels == block.out_channels == 8


def test_a_width_that_is_not_clear_is_named_where_a_method_reads_it() -> None:
    with pytest.warns(UserWarning, match=r'which width block\.width is, which fuse\(\) reads: call it before combing'):
        assert slimmed(Unclear(width=8)).width == 8
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert slimmed(Block(width=8)).width == 8  # which nothing reads


def test_what_follows_by_name_by_side_and_by_size() -> None:
    sizes = Layer.of(nn.Linear(8, 6), nn.Linear(3, 2))
    assert followed('in_features', 8, [sizes]) == {3} and followed('out_features', 6, [sizes]) == {2}
    assert followed('in_planes', 8, [sizes]) == {3} and followed('out_dims', 6, [sizes]) == {2}
    assert followed('embed_dims', 8, [sizes]) == {3} and followed('widths[1]', 7, [sizes]) == set()
    assert followed('head_dims', 8, [sizes]) == followed('stage_width', 6, [sizes]) == set()
    assert followed('num_heads', 8, [sizes]) == followed('patch', 6, [sizes]) == set()
    small = Layer.of(nn.Linear(3, 4), nn.Linear(2, 4))
    assert followed('dim', 3, [small]) == set() and followed('in_channels', 3, [small]) == {2}
    assert followed('embed_dims', 8, [sizes, Layer.of(nn.Linear(8, 4), nn.Linear(5, 4))]) == {3, 5}


def test_what_methods_read_is_found_in_byte_code() -> None:
    def outer(self: Any, x: Any) -> Any:
        def inner() -> Any:
            self.set_here = 1
            return self.deep.attribute

        return self.method(x.shape), inner()

    reads = reads_of(outer.__code__)
    assert {'method', 'deep'} <= reads.own and {'shape', 'attribute'} <= reads.others and 'set_here' not in reads.own
    methods = Methods(Branching(in_channels=1, out_channels=1).modules(), lambda model, x: model(x))
    assert methods.run_reads(Branching, 'out_channels') and not methods.run_reads(Branching, 'width')
    assert methods.later(Branching, 'in_channels') == 'fuse' and methods.later(Branching, 'out_channels') is None
    called = Methods(Branching(in_channels=1, out_channels=1).modules(), lambda model, x: model.fuse())
    assert called.later(Branching, 'in_channels') is None
