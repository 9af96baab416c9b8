"""Name one model of every architecture family in torchvision: pictures, masks, boxes, clips and optical flow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo_family import Deployed, Family

KEYPOINTS = 17  # of a person


@dataclass(frozen=True)
class Torchvision(Family):
    """Hold a row that `torchvision.models.get_model(config, **options)` builds."""

    options: dict[str, Any] = field(default_factory=dict)

    def net(self) -> Deployed:
        return Deployed(self.network(), mode=None)

    def network(self) -> nn.Module:
        """Build the bare network, with no weights from outside."""
        from torchvision.models import get_model

        return get_model(self.config, weights=None, **self.options)


@dataclass(frozen=True)
class Detection(Torchvision):
    """Hold a detector: its input is a list of pictures; what its modules at `heads` give out is compared too.

    It scales pictures to their own size, gives out every box whatever its score, and, where layers follow the choice of
    boxes, drops none because of its neighbours: else the number of boxes, and so the cost, would depend on the values.
    """

    heads: tuple[str, ...] = ()

    def net(self) -> Deployed:
        return Detector(self.network(), mode=None, heads=self.heads)

    def inputs(self, batch: int = 0, size: tuple[int, ...] = (), seed: int = 0) -> tuple[Any, ...]:
        return (list(super().inputs(batch, size, seed)[0].unbind()),)


class Detector(Deployed):
    """Run a detector on a list of pictures `(3, H, W)`; while it trains, with the same two boxes in each."""

    def call(self, *inputs: Any) -> Any:
        return self.net(inputs[0], [target(picture) for picture in inputs[0]] if self.training else None)


def target(picture: Tensor) -> dict[str, Tensor]:
    """Return what a detector learns from: boxes in pixels, their classes, masks and keypoints."""
    boxes = picture.new_tensor([[8, 8, 60, 50], [30, 20, 90, 84]])
    masks = torch.zeros(2, *picture.shape[1:], dtype=torch.uint8, device=picture.device)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    points = torch.cat([centre, torch.ones_like(centre[:, :1])], 1)  # (2, 3)
    labels = torch.ones(2, dtype=torch.int64, device=picture.device)
    return {'boxes': boxes, 'labels': labels, 'masks': masks, 'keypoints': points[:, None].repeat(1, KEYPOINTS, 1)}


@dataclass(frozen=True)
class OpticalFlow(Torchvision):
    """Hold a network that takes two frames and refines the flow between them three times."""

    def net(self) -> Deployed:
        return Flow(self.network(), mode=None)


class Flow(Deployed):
    """Run an optical flow network on two frames `(N, 3, H, W)`."""

    def call(self, *inputs: Any) -> Any:
        return self.net(*inputs, num_flow_updates=3)


def pictures(config: str, size: int = 224, **options: Any) -> Family:
    return Torchvision('torchvision', config, config, (size, size), options=options)


def masks(config: str) -> Family:
    options = dict(weights_backbone=None, num_classes=21)
    return Torchvision('torchvision', config, config, (128, 128), options=options | _aux(config))


def _aux(config: str) -> dict[str, bool]:
    return {} if config.startswith('lraspp') else {'aux_loss': True}


def boxes(config: str, heads: str, size: int = 128, **options: Any) -> Family:
    options = dict(weights_backbone=None, num_classes=11) | options
    return Detection('torchvision', config, config, (size, size), options=options, heads=tuple(heads.split()))


def clips(config: str, frames: int = 8, size: int = 64, **options: Any) -> Family:
    return Torchvision('torchvision', config, config, (frames, size, size), options=options)


def flow(config: str) -> Family:
    return OpticalFlow('torchvision', config, config, (128, 128), views=2)


SCALED = dict(min_size=128, max_size=192)
RCNN = 'rpn.head roi_heads.box_predictor'
PROPOSALS = dict(rpn_nms_thresh=1.0, rpn_pre_nms_top_n_test=40, rpn_post_nms_top_n_test=20, box_score_thresh=0.0)
ALL_BOXES = dict(box_nms_thresh=1.0, box_detections_per_img=10)
DENSE_BOXES = dict(score_thresh=0.0, detections_per_img=20, topk_candidates=40)

TORCHVISION: tuple[Family, ...] = (
    pictures('alexnet'),
    pictures('convnext_tiny'),
    pictures('densenet121'),
    pictures('efficientnet_b0'),
    pictures('efficientnet_v2_s', 128),
    pictures('googlenet', aux_logits=True, init_weights=False),
    pictures('inception_v3', 299, aux_logits=True, init_weights=False),
    pictures('maxvit_t'),
    pictures('mnasnet0_5'),
    pictures('mobilenet_v2'),
    pictures('mobilenet_v3_small'),
    pictures('regnet_x_400mf'),
    pictures('regnet_y_400mf'),
    pictures('resnet18'),
    pictures('resnext50_32x4d', 128),
    pictures('shufflenet_v2_x0_5'),
    pictures('squeezenet1_1'),
    pictures('swin_t'),
    pictures('swin_v2_t', 256),
    pictures('vgg11_bn'),
    pictures('vit_b_32'),
    pictures('wide_resnet50_2', 128),
    masks('deeplabv3_mobilenet_v3_large'),
    masks('fcn_resnet50'),
    masks('lraspp_mobilenet_v3_large'),
    boxes('fasterrcnn_mobilenet_v3_large_320_fpn', RCNN, **SCALED, **PROPOSALS),
    boxes('fcos_resnet50_fpn', 'head', **SCALED, **DENSE_BOXES),
    boxes(
        'keypointrcnn_resnet50_fpn',
        f'{RCNN} roi_heads.keypoint_predictor',
        **SCALED,
        **PROPOSALS,
        **ALL_BOXES,
        num_classes=2,
    ),
    boxes('maskrcnn_resnet50_fpn', f'{RCNN} roi_heads.mask_predictor', **SCALED, **PROPOSALS, **ALL_BOXES),
    boxes('retinanet_resnet50_fpn', 'head', **SCALED, **DENSE_BOXES),
    boxes('ssd300_vgg16', 'head', 300, **DENSE_BOXES),
    boxes('ssdlite320_mobilenet_v3_large', 'head', 320, **DENSE_BOXES),
    clips('mc3_18'),
    clips('mvit_v2_s', 16, 224),
    clips('r2plus1d_18'),
    clips('r3d_18'),
    clips('s3d', 16, 224),
    clips('swin3d_t'),
    flow('raft_large'),
    flow('raft_small'),
)
