"""Name the self-supervised methods of mmpretrain, which are run as they are trained: the loss is the output."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.zoo_configured import Configured, dotted
from benchmarks.zoo_family import Deployed, Family

MASKED = 75  # patches of a picture; a decoder of CAE has room for no other number


@dataclass(frozen=True)
class Pretraining(Configured):
    """Hold a self-supervised method.

    Its samples have a mask of `(grid, grid)` patches, or `(grid * grid,)` where it is flat; of a method that learns
    from another network's view of the same picture, the second view is half as large.
    """

    grid: int = 0
    flat: bool = False
    half: bool = False

    def prepare(self) -> None:
        from mmengine.logging import MessageHub

        MessageHub.get_current_instance().update_info('max_iters', 100)  # what a momentum anneals over

    def net(self) -> Deployed:
        self.prepare()
        net = self.network()
        for name, buffer in net.named_buffers():
            if name.endswith('quantize.embedding.initted'):  # else its 8192 codes are copies of one picture's patches,
                buffer.fill_(1)  # and rounding chooses among equals
        return Loss(net, self.grid, self.flat)

    def inputs(self, batch: int = 0, size: tuple[int, ...] = (), seed: int = 0) -> tuple[Any, ...]:
        first, *others = super().inputs(batch, size, seed)
        return first, *(nn.functional.avg_pool2d(other, 2) if self.half else other for other in others)


class Loss(Deployed):
    """Run a method in mode `loss` on one or more views of some pictures; a fixed choice of patches is masked."""

    def __init__(self, net: nn.Module, grid: int, flat: bool) -> None:
        super().__init__(net, mode='loss')
        self.grid = grid
        self.flat = flat

    def call(self, *inputs: Any) -> Any:
        order = torch.randperm(self.grid**2, generator=torch.Generator().manual_seed(0))
        mask = (order < MASKED).long()
        mask = mask if self.flat else mask.reshape(self.grid, self.grid)
        samples = [SimpleNamespace(mask=mask) for _ in inputs[0]]
        return self.net(list(inputs) if len(inputs) > 1 else inputs[0], samples, mode='loss')


@dataclass(frozen=True)
class Retrieval(Configured):
    """Hold a retriever, with a gallery of random features."""

    def net(self) -> Deployed:
        net = self.network()
        net.prototype = torch.randn(5, net.head.in_channels, generator=torch.Generator().manual_seed(0))
        net.prepare_prototype()
        return Retriever(net)


class Retriever(Deployed):
    """Run a retriever as it is trained, and match its features with the gallery."""

    def call(self, *inputs: Any) -> Any:
        from mmpretrain.structures import DataSample

        samples = [DataSample().set_gt_label(number) for number in range(len(inputs[0]))]
        return self.net(inputs[0], samples, mode='loss'), self.net.matching(self.net(inputs[0])[-1])


def masked(
    name: str,
    config: str,
    grid: int = 14,
    views: int = 1,
    size: int = 224,
    flat: bool = False,
    half: bool = False,
    folder: str = '',
    **changes: Any,
) -> Family:
    """Make a row of a method that masks patches."""
    path = f'{folder or name}/{config}.py'
    return Pretraining(
        'mmpretrain', name, path, (size, size), views=views, changes=dotted(changes), grid=grid, flat=flat, half=half
    )


def contrasted(name: str, config: str, folder: str = '', size: int = 96, **changes: Any) -> Family:
    """Make a row of a method that compares two views of each of two pictures."""
    path = f'{folder or name}/{config}.py'
    return Pretraining('mmpretrain', name, path, (size, size), batch=2, views=2, changes=dotted(changes))


PRETRAINING: tuple[Family, ...] = (
    Retrieval(
        'mmpretrain',
        'arcface_retrieval',
        'arcface/resnet50-arcface_8xb32_inshop.py',
        (96, 96),
        changes=dotted({'model__prototype': 'none'}),
    ),
    contrasted('barlowtwins', 'barlowtwins_resnet50_8xb256-coslr-300e_in1k'),
    masked('beit_pretraining', 'beit_beit-base-p16_8xb256-amp-coslr-300e_in1k', 14, 2, half=True, folder='beit'),
    masked('beitv2', 'beitv2_beit-base-p16_8xb256-amp-coslr-300e_in1k', 14, 2),
    contrasted('byol', 'byol_resnet50_16xb256-coslr-200e_in1k'),
    masked('cae', 'cae_beit-base-p16_8xb256-amp-coslr-300e_in1k', 14, 2, half=True),
    contrasted('densecl', 'densecl_resnet50_8xb32-coslr-200e_in1k', model__queue_len=64),
    masked('itpn', 'itpn-pixel_hivit-base-p16_8xb512-amp-coslr-400e_in1k'),
    masked('mae', 'mae_vit-base-p16_8xb512-amp-coslr-300e_in1k'),
    masked('mae_hivit', 'mae_hivit-base-p16_8xb512-amp-coslr-400e_in1k', folder='mae'),
    masked('maskfeat', 'maskfeat_vit-base-p16_8xb256-amp-coslr-300e_in1k', flat=True),
    masked('mff', 'mff_vit-base-p16_8xb512-amp-coslr-300e_in1k'),
    masked('mixmim_pretraining', 'mixmim_mixmim-base_16xb128-coslr-300e_in1k', folder='mixmim'),
    contrasted('mocov2', 'mocov2_resnet50_8xb32-coslr-200e_in1k', model__queue_len=64),
    contrasted('mocov3_pretraining', 'mocov3_vit-small-p16_16xb256-amp-coslr-300e_in1k', 'mocov3', 224),
    contrasted('simclr', 'simclr_resnet50_16xb256-coslr-200e_in1k'),
    masked('simmim', 'simmim_swin-base-w6_16xb128-amp-coslr-100e_in1k-192px', 48, size=192),
    contrasted('simsiam', 'simsiam_resnet50_8xb32-coslr-100e_in1k'),
    masked('spark', 'spark_sparse-convnextv2-tiny_16xb256-amp-coslr-800e_in1k'),
    contrasted('swav', 'swav_resnet50_8xb32-mcrop-coslr-200e_in1k-224px-96px', model__head__loss__num_crops=[2]),
)
