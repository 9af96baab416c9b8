"""Name one config of every detector family in mmdet, and build it with a sample for each picture.

A family is a folder of mmdet's configs: `DETECTORS` has the config that is swept, `DETECTORS_OUT` the folders that are
not, each with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import mmcpd.engine  # noqa: F401  (before mmdet: it stands in for mmcv's compiled operators)
from benchmarks.zoo_configured import Configured, config_root, dotted
from benchmarks.zoo_family import Deployed, Family
from mmcpd.engine.operators import followed
from mmcpd.engine.passes import Pass, deployed_pass
from mmcpd.engine.samples import detector_sample, made_up, resized
from mmcpd.nested import tensors_in

PROPOSALS = 50  # enough for each level of a pyramid


class DeployedDetector(Deployed):
    """Run a detector as it is deployed: pictures in, each with a sample of its size; maps out, or what it predicts."""

    def __init__(self, net: nn.Module, picture: Tensor) -> None:
        data = made_up(net, picture)
        super().__init__(net, deployed_pass(net, data).mode)
        self.size = tuple(picture.shape[-2:])
        self.sample = data.get('data_samples', [detector_sample(*self.size)])[0]

    def call(self, pictures: Tensor) -> Any:
        sample = resized(self.sample, self.size, pictures.shape[-2:])
        with followed():
            data = {'inputs': pictures, 'data_samples': [sample] * len(pictures)}
            return tensors_in(Pass(str(self.mode))(self.net, data))  # what it predicts is in samples


@dataclass(frozen=True)
class Detector(Configured):
    """Hold a row of mmdet; second stages take few proposals."""

    def net(self) -> Deployed:
        return DeployedDetector(self.network(), self.inputs()[0])

    def smaller(self, model: dict[str, Any]) -> dict[str, Any]:
        stages = model.get('test_cfg') or {}
        if stages.get('rpn'):
            stages['rpn']['max_per_img'] = PROPOSALS
        if 'teacher_config' in model:  # named from the folder of mmdet's sources
            model['teacher_config'] = str(config_root('mmdet') / Path(model['teacher_config']).relative_to('configs'))
        return model


def detector(name: str, config: str, size: int = 128, **changes: Any) -> Family:
    """Make a row of mmdet; underscores in the names of changes stand for dots where doubled."""
    return Detector('mmdet', name, f'{name}/{config}.py', (size, size), changes=dotted(changes))


DETECTORS: tuple[Family, ...] = (
    detector('atss', 'atss_r50_fpn_1x_coco'),
    detector('autoassign', 'autoassign_r50-caffe_fpn_1x_coco'),
    detector('boxinst', 'boxinst_r50_fpn_ms-90k_coco'),
    detector('cascade_rcnn', 'cascade-rcnn_r50_fpn_1x_coco'),
    detector('cascade_rpn', 'cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco'),
    detector('centernet', 'centernet_r18_8xb16-crop512-140e_coco'),
    detector('centripetalnet', 'centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco'),
    detector('condinst', 'condinst_r50_fpn_ms-poly-90k_coco_instance'),
    detector('conditional_detr', 'conditional-detr_r50_8xb2-50e_coco'),
    detector('convnext', 'mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco'),
    detector('cornernet', 'cornernet_hourglass104_8xb6-210e-mstest_coco'),
    detector('crowddet', 'crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman'),
    detector('dab_detr', 'dab-detr_r50_8xb2-50e_coco'),
    detector('dcn', 'faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco'),
    detector('dcnv2', 'faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco'),
    detector('ddod', 'ddod_r50_fpn_1x_coco'),
    detector('ddq', 'ddq-detr-4scale_r50_8xb2-12e_coco', model__num_queries=100),
    detector('deformable_detr', 'deformable-detr_r50_16xb2-50e_coco'),
    detector('detectors', 'cascade-rcnn_r50-rfp_1x_coco'),
    detector('detr', 'detr_r18_8xb2-500e_coco'),
    detector('dino', 'dino-4scale_r50_8xb2-12e_coco', model__num_queries=100),
    detector('double_heads', 'dh-faster-rcnn_r50_fpn_1x_coco'),
    detector('dynamic_rcnn', 'dynamic-rcnn_r50_fpn_1x_coco'),
    detector('efficientnet', 'retinanet_effb3_fpn_8xb4-crop896-1x_coco'),
    detector('empirical_attention', 'faster-rcnn_r50-attn1111_fpn_1x_coco'),
    detector('fast_rcnn', 'fast-rcnn_r50_fpn_1x_coco'),
    detector('faster_rcnn', 'faster-rcnn_r50_fpn_1x_coco'),
    detector('fcos', 'fcos_r50-caffe_fpn_gn-head_1x_coco'),
    detector('foveabox', 'fovea_r50_fpn_4xb4-1x_coco'),
    detector('fpg', 'faster-rcnn_r50_fpg_crop640-50e_coco'),
    detector('free_anchor', 'freeanchor_r50_fpn_1x_coco'),
    detector('fsaf', 'fsaf_r50_fpn_1x_coco'),
    detector('gcnet', 'mask-rcnn_r50-gcb-r4-c3-c5_fpn_1x_coco'),
    detector('gfl', 'gfl_r50_fpn_1x_coco'),
    detector('ghm', 'retinanet_r50_fpn_ghm-1x_coco'),
    detector('gn', 'mask-rcnn_r50_fpn_gn-all_2x_coco'),
    detector('gn+ws', 'faster-rcnn_r50_fpn_gn-ws-all_1x_coco'),
    detector('grid_rcnn', 'grid-rcnn_r50_fpn_gn-head_1x_coco'),
    detector('groie', 'faste-rcnn_r50_fpn_groie_1x_coco'),
    detector('guided_anchoring', 'ga-retinanet_r50_fpn_1x_coco'),
    detector('hrnet', 'faster-rcnn_hrnetv2p-w18-1x_coco'),
    detector('htc', 'htc_r50_fpn_1x_coco'),
    detector('lad', 'lad_r50-paa-r101_fpn_2xb8_coco_1x'),
    detector('ld', 'ld_r18-gflv1-r101_fpn_1x_coco'),
    detector('libra_rcnn', 'libra-faster-rcnn_r50_fpn_1x_coco'),
    detector('mask2former', 'mask2former_r50_8xb2-lsj-50e_coco'),
    detector('mask_rcnn', 'mask-rcnn_r50_fpn_1x_coco'),
    detector('maskformer', 'maskformer_r50_ms-16xb1-75e_coco'),
    detector('ms_rcnn', 'ms-rcnn_r50_fpn_1x_coco'),
    detector('nas_fcos', 'nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco'),
    detector('nas_fpn', 'retinanet_r50_nasfpn_crop640-50e_coco'),
    detector('paa', 'paa_r50_fpn_1x_coco'),
    detector('pafpn', 'faster-rcnn_r50_pafpn_1x_coco'),
    detector('panoptic_fpn', 'panoptic-fpn_r50_fpn_1x_coco'),
    detector('pisa', 'faster-rcnn_r50_fpn_pisa_1x_coco'),
    detector('point_rend', 'point-rend_r50-caffe_fpn_ms-1x_coco'),
    detector('pvt', 'retinanet_pvt-t_fpn_1x_coco'),
    detector('queryinst', 'queryinst_r50_fpn_1x_coco'),
    detector('regnet', 'faster-rcnn_regnetx-3.2GF_fpn_1x_coco'),
    detector('reppoints', 'reppoints-moment_r50_fpn_1x_coco'),
    detector('res2net', 'faster-rcnn_res2net-101_fpn_2x_coco'),
    detector('resnest', 'faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco'),
    detector('retinanet', 'retinanet_r18_fpn_1x_coco'),
    detector('rpn', 'rpn_r50_fpn_1x_coco'),
    detector('rtmdet', 'rtmdet_tiny_8xb32-300e_coco'),
    detector('sabl', 'sabl-retinanet_r50_fpn_1x_coco'),
    detector('scnet', 'scnet_r50_fpn_1x_coco'),
    detector('solo', 'solo_r50_fpn_1x_coco'),
    detector('solov2', 'solov2_r50_fpn_1x_coco'),
    detector('sparse_rcnn', 'sparse-rcnn_r50_fpn_1x_coco'),
    detector('ssd', 'ssd300_coco', 300),
    detector('swin', 'retinanet_swin-t-p4-w7_fpn_1x_coco'),
    detector('tood', 'tood_r50_fpn_1x_coco'),
    detector('tridentnet', 'tridentnet_r50-caffe_1x_coco'),
    detector('vfnet', 'vfnet_r50_fpn_1x_coco'),
    detector('yolact', 'yolact_r50_1xb8-55e_coco'),
    detector('yolo', 'yolov3_mobilenetv2_8xb24-320-300e_coco'),
    detector('yolof', 'yolof_r50-c5_8xb8-1x_coco'),
    detector('yolox', 'yolox_tiny_8xb8-300e_coco'),
)
_RECIPE = 'a way to train; the networks are those of other rows'
_DATA = 'a data set; the networks are those of other rows'
_TEXT = 'needs a language model, which is downloaded'
_TRACK = 'a tracker around a detector of another row'
DETECTORS_OUT: dict[str, str] = {
    **dict.fromkeys(('albu_example', 'common', 'instaboost', 'legacy_1.x', 'resnet_strikes_back', 'scratch',
                     'seesaw_loss', 'selfsup_pretrain', 'simple_copy_paste', 'soft_teacher', 'strong_baselines'),
                    _RECIPE),
    **dict.fromkeys(('cityscapes', 'deepfashion', 'dsdl', 'lvis', 'objects365', 'openimages', 'pascal_voc', 'v3det',
                     'wider_face'), _DATA),
    **dict.fromkeys(('glip', 'grounding_dino', 'mm_grounding_dino'), _TEXT),
    **dict.fromkeys(('bytetrack', 'deepsort', 'mask2former_vis', 'masktrack_rcnn', 'ocsort', 'qdtrack', 'reid', 'sort',
                     'strongsort'), _TRACK),
    'carafe': "needs carafe of mmcv's compiled operators, for which torchvision has no counterpart",
    'clrnet': 'finds lanes; its config is in Python and has data of its own',
    'dyhead': "hands a deformable convolution offsets of another size than its output has, which torchvision's refuses",
    'misc': 'wraps models of Detectron2',
    'timm_example': 'needs timm, which has rows of its own',
}  # fmt: skip
