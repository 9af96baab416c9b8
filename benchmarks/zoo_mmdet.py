"""Comb, mask, slim and count one config of each detector family in mmdet, with random weights.

    python -m benchmarks.zoo_mmdet --output rows.json            # all families
    python -m benchmarks.zoo_mmdet retinanet detr                # these

A family is a folder of mmdet's configs: `FAMILIES` has the config that is swept, `OUT` the folders that are not, each
with the reason; `unlisted()` finds folders in neither, which is how a newer mmdet shows up.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mmcpd.engine  # noqa: F401  (it registers what configs name)
from mmcpd.coupling import Coupling
from mmcpd.engine.build import build_dense
from mmcpd.engine.combing import comb_by_config
from mmcpd.errors import CombError, SlimError, first_line
from mmcpd.slim import slim
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import FAILURES, in_double, random_keep, randomised

KEEP = 0.5
PROPOSALS = 50  # enough for each level of a pyramid


@dataclass(frozen=True)
class Detector:
    """Hold one row: a config below `mmdet/.mim/configs`, the side of its picture, overrides by dotted keys."""

    name: str
    config: str
    size: int = 128
    changes: dict[str, Any] = field(default_factory=dict)


def detector(name: str, config: str, size: int = 128, **changes: Any) -> Detector:
    """Make a row; double underscores in the names of changes stand for dots."""
    return Detector(name, f'{name}/{config}.py', size, {k.replace('__', '.'): v for k, v in changes.items()})


FAMILIES: tuple[Detector, ...] = (
    detector('atss', 'atss_r50_fpn_1x_coco'),
    detector('autoassign', 'autoassign_r50-caffe_fpn_1x_coco'),
    detector('boxinst', 'boxinst_r50_fpn_ms-90k_coco'),
    detector('carafe', 'faster-rcnn_r50_fpn-carafe_1x_coco'),
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
    detector('ddq', 'ddq-detr-4scale_r50_8xb2-12e_coco'),
    detector('deformable_detr', 'deformable-detr_r50_16xb2-50e_coco'),
    detector('detectors', 'cascade-rcnn_r50-rfp_1x_coco'),
    detector('detr', 'detr_r18_8xb2-500e_coco'),
    detector('dino', 'dino-4scale_r50_8xb2-12e_coco'),
    detector('double_heads', 'dh-faster-rcnn_r50_fpn_1x_coco'),
    detector('dyhead', 'atss_r50_fpn_dyhead_1x_coco'),
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
OUT: dict[str, str] = {
    **dict.fromkeys(('albu_example', 'common', 'instaboost', 'legacy_1.x', 'resnet_strikes_back', 'scratch',
                     'seesaw_loss', 'selfsup_pretrain', 'simple_copy_paste', 'soft_teacher', 'strong_baselines'),
                    _RECIPE),
    **dict.fromkeys(('cityscapes', 'deepfashion', 'dsdl', 'lvis', 'objects365', 'openimages', 'pascal_voc', 'v3det',
                     'wider_face'), _DATA),
    **dict.fromkeys(('glip', 'grounding_dino', 'mm_grounding_dino'), _TEXT),
    **dict.fromkeys(('bytetrack', 'deepsort', 'mask2former_vis', 'masktrack_rcnn', 'ocsort', 'qdtrack', 'reid', 'sort',
                     'strongsort'), _TRACK),
    'clrnet': 'finds lanes; its config is in Python and has data of its own',
    'misc': 'wraps models of Detectron2',
    'timm_example': 'needs timm, which has rows of its own',
}  # fmt: skip


def root() -> Path:
    """Return the folder of mmdet's configs."""
    spec = find_spec('mmdet')
    assert spec is not None and spec.submodule_search_locations, 'mmdet is not installed'
    return Path(spec.submodule_search_locations[0]) / '.mim' / 'configs'


def unlisted() -> list[str]:
    """List the config folders that neither `FAMILIES` nor `OUT` knows."""
    known = {family.name for family in FAMILIES} | set(OUT)
    folders = [folder.name for folder in sorted(root().iterdir()) if folder.is_dir()]
    return [name for name in folders if name not in known | {'_base_', '__pycache__'}]


@dataclass(frozen=True)
class Row:
    """Hold what was measured of one family; `error` is empty if all of it was."""

    name: str
    config: str
    error: str = ''
    mode: str = ''
    groups: int = 0
    prunable: float = 0.0  # share of the channels
    gap: float = 0.0  # masked against slim
    control: float = 0.0  # masked against a slim model of other units
    dtype: str = ''
    macs_cost: int = 0
    macs_counted: int = 0
    frozen: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()
    untried: str = ''
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Say whether masking and slimming agree, the control does not, and the cost is what was counted."""
        exact = self.gap < (1e-9 if self.dtype == 'float64' else 1e-3) < self.control
        return not self.error and exact and self.macs_cost == self.macs_counted


def sweep(family: Detector) -> Row:
    """Measure one family."""
    begun, row = time.perf_counter(), Row(family.name, family.config)
    try:
        row = measured(family, row)
    except (*FAILURES, CombError, SlimError, ImportError, OSError) as error:
        row = replace(row, error=f'{type(error).__name__}: {first_line(error)}')
    return replace(row, seconds=round(time.perf_counter() - begun, 1))


def measured(family: Detector, row: Row) -> Row:
    """Comb a family's network, compare masked with slim in float64, and count what the slim one costs."""
    cfg = read(family)
    torch.manual_seed(0)
    model = randomised(build_dense(cfg))
    coupling = comb_by_config(model, cfg, input_shape=(3, family.size, family.size))
    channels, width = coupling.prunable_channels()
    row = replace(
        row, mode=getattr(coupling.example.forward, 'mode', ''), groups=len(coupling.groups),
        prunable=channels / max(width, 1), untried=coupling.untried,
        frozen=tuple(f'{why} ({rows} rows)' for why, rows in coupling.merged_reasons()[:4]),
        unsupported=tuple(f'{op} in {where}' for op, where in coupling.unsupported),
    )  # fmt: skip
    double, example = in_double(model, coupling.example)
    coupling = replace(coupling, example=example)
    keep, other = (random_keep(coupling, KEEP, seed) for seed in (0, 1))
    small = slim(double, coupling, keep)
    return replace(
        row, dtype=str(next(double.parameters()).dtype).removeprefix('torch.'),
        gap=compare(double, coupling, keep, small),
        control=compare(double, coupling, keep, slim(double, coupling, other)),
        macs_cost=coupling.cost(keep).macs, macs_counted=count_macs(small, coupling),
    )  # fmt: skip


def read(family: Detector) -> Config:
    """Read a config: no file is downloaded, no data are read, few proposals."""
    cfg = Config.fromfile(root() / family.config)
    for name in ('train', 'val', 'test'):
        cfg[f'{name}_dataloader'] = None
    stages = cfg.model.get('test_cfg') or {}
    if 'rpn' in stages:
        stages.rpn.max_per_img = PROPOSALS
    cfg.merge_from_dict(family.changes)
    forget_weights_(cfg.model)
    return cfg


def forget_weights_(config: Any) -> None:
    """Take files of weights out of a model's config."""
    if isinstance(config, ConfigDict):
        for name in ('init_cfg', 'pretrained', 'teacher_ckpt'):
            if name in config:
                config[name] = None
    for part in config.values() if isinstance(config, dict) else config if isinstance(config, list | tuple) else ():
        forget_weights_(part)


def count_macs(model: nn.Module, coupling: Coupling) -> int:
    """Count the multiply-accumulates of the deployed pass with torch's own counter."""
    rules = {torch.ops.torchvision.deform_conv2d: deformable_flops}
    with FlopCounterMode(display=False, custom_mapping=rules) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        coupling.example.run(model.eval().requires_grad_(False))
    return counter.get_total_flops() // 2


def deformable_flops(_x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Return the operations of a deformable convolution, those of the plain one."""
    batch, _channels, height, width = out_shape
    return 2 * batch * height * width * int(torch.Size(weight).numel())


def line(row: Row) -> str:
    """Return a row of the table."""
    verdict = 'ok' if row.passed else row.error or f'MACs {row.macs_cost} != {row.macs_counted}'
    return (
        f'{row.name:20} {row.mode:8} {row.groups:4} groups {row.prunable:6.1%} gap {row.gap:.0e} '
        f'control {row.control:.0e} {row.dtype} {row.seconds:5.0f} s  {verdict} {" ".join(row.unsupported)}'
    )


def main() -> None:
    """Sweep the families that are named, or all, and write the rows as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', help='families; all by default')
    parser.add_argument('--output', type=Path, help='JSON file of the rows')
    args = parser.parse_args()
    rows: list[Row] = []
    for family in FAMILIES:
        if not args.names or family.name in args.names:
            rows.append(sweep(family))
            print(line(rows[-1]), flush=True)
            if args.output:
                args.output.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(f'{sum(row.passed for row in rows)} of {len(rows)} exact; not listed: {unlisted() or "none"}')


if __name__ == '__main__':
    main()
