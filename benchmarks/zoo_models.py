"""Name one config of every architecture family in mmpretrain and mmseg, and all families of the zoo.

An architecture family is a folder of `<package>/.mim/configs`, and our own SeaFormer. `FAMILIES` has the config that is
swept (the smallest sensible variant), `OUT` the folders that are not, each with the reason; `unlisted()` finds folders
in neither, which is how a newer version of the packages shows up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.zoo_configured import Configured, config_root, dotted
from benchmarks.zoo_family import Deployed, Family
from benchmarks.zoo_mmdet import DETECTORS, DETECTORS_OUT
from benchmarks.zoo_pretraining import PRETRAINING
from benchmarks.zoo_torchvision import TORCHVISION


class DeployedSegmentor(Deployed):
    """Run a segmentor whose head needs the size of the pictures, or another head: pictures in, scores of pixels out."""

    def call(self, pictures: Tensor) -> Tensor:
        size = tuple(pictures.shape[-2:])
        return self.net.encode_decode(pictures, [dict(img_shape=size, pad_shape=size) for _ in pictures])


@dataclass(frozen=True)
class Predicting(Configured):
    """Hold a row of mmseg whose tensor mode does not run."""

    def net(self) -> Deployed:
        return DeployedSegmentor(self.network())


def classifier(name: str, config: str, size: int = 224, channels: int = 3, **changes: Any) -> Family:
    """Make a row of mmpretrain; underscores in the names of changes stand for dots where doubled."""
    return Configured('mmpretrain', name, f'{name}/{config}.py', (size, size), channels, changes=dotted(changes))


def segmentor(name: str, config: str, size: int = 128, **changes: Any) -> Family:
    """Make a row of mmseg; underscores in the names of changes stand for dots where doubled."""
    return Configured('mmseg', name, f'{name}/{config}.py', (size, size), changes=dotted(changes))


def predicting(name: str, config: str, size: int = 128) -> Family:
    return Predicting('mmseg', name, f'{name}/{config}.py', (size, size))


ARCHITECTURES: tuple[Family, ...] = (
    classifier('arcface', 'resnet50-arcface_8xb32_inshop', model__head=None),
    classifier('beit', 'benchmarks/beit-base-p16_8xb128-coslr-100e_in1k'),
    classifier('clip', 'vit-base-p32_pt-64xb64_in1k-384px', model__backbone__img_size=224),
    classifier('conformer', 'conformer-tiny-p16_8xb128_in1k'),
    classifier('convmixer', 'convmixer-768-32_10xb64_in1k'),
    classifier('convnext', 'convnext-tiny_32xb128_in1k'),
    classifier('convnext_v2', 'convnext-v2-atto_32xb32_in1k'),
    classifier('cspnet', 'cspresnext50_8xb32_in1k'),
    classifier('csra', 'resnet101-csra_1xb16_voc07-448px'),
    classifier('davit', 'davit-tiny_4xb256_in1k'),
    classifier('deit', 'deit-small_4xb256_in1k'),
    classifier('deit3', 'deit3-small-p16_64xb64_in1k'),
    classifier('densenet', 'densenet121_4xb256_in1k'),
    classifier('dinov2', 'vit-small-p14_dinov2-pre_headless', model__backbone__img_size=224),
    classifier('edgenext', 'edgenext-xxsmall_8xb256_in1k'),
    classifier('efficientformer', 'efficientformer-l1_8xb128_in1k'),
    classifier('efficientnet', 'efficientnet-b0_8xb32_in1k'),
    classifier('efficientnet_v2', 'efficientnetv2-b0_8xb32_in1k'),
    classifier('eva02', 'eva02-tiny-p14_in1k', model__backbone__img_size=224),
    classifier('glip', 'glip-t_headless'),
    classifier('hivit', 'hivit-tiny-p16_16xb64_in1k'),
    classifier('hornet', 'hornet-tiny_8xb128_in1k'),
    classifier('hrnet', 'hrnet-w18_4xb32_in1k'),
    classifier('inception_v3', 'inception-v3_8xb32_in1k', 299),
    classifier('lenet', 'lenet5_mnist', 32, channels=1),
    classifier('levit', 'levit-128s_8xb256_in1k'),
    classifier('mixmim', 'benchmarks/mixmim-base_8xb128-coslr-100e_in1k'),
    classifier('mlp_mixer', 'mlp-mixer-base-p16_64xb64_in1k'),
    classifier('mobilenet_v2', 'mobilenet-v2_8xb32_in1k'),
    classifier('mobilenet_v3', 'mobilenet-v3-small_8xb128_in1k'),
    classifier('mobileone', 'mobileone-s0_8xb32_in1k'),
    classifier('mobilevit', 'mobilevit-xxsmall_8xb128_in1k', 256),
    classifier('mocov3', 'benchmarks/vit-small-p16_8xb128-linear-coslr-90e_in1k'),
    classifier('mvit', 'mvitv2-tiny_8xb256_in1k'),
    classifier('poolformer', 'poolformer-s12_32xb128_in1k'),
    classifier('regnet', 'regnetx-400mf_8xb128_in1k'),
    Configured(
        'mmpretrain',
        'replknet',
        '',  # its config files import Python modules, which Config.fromfile refuses: the model is written out
        changes={
            'model': dict(
                type='ImageClassifier',
                backbone=dict(type='RepLKNet', arch='31B', out_indices=(3,)),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=1000, in_channels=1024),
            )
        },
    ),
    classifier('repmlp', 'repmlp-base_8xb64_in1k'),
    classifier('repvgg', 'repvgg-A0_8xb32_in1k'),
    classifier('res2net', 'res2net50-w14-s8_8xb32_in1k'),
    classifier('resnest', 'resnest50_32xb64_in1k'),
    classifier('resnet', 'resnet50_8xb32_in1k'),
    classifier('resnext', 'resnext50-32x4d_8xb32_in1k'),
    classifier('revvit', 'revvit-small_8xb256_in1k'),
    classifier('riformer', 'riformer-s12_8xb128_in1k'),
    classifier('sam', 'vit-base-p16_sam_headless', model__backbone__img_size=224),
    classifier('seresnet', 'seresnet50_8xb32_in1k'),
    classifier('shufflenet_v1', 'shufflenet-v1-1x_16xb64_in1k'),
    classifier('shufflenet_v2', 'shufflenet-v2-1x_16xb64_in1k'),
    classifier('swin_transformer', 'swin-tiny_16xb64_in1k'),
    classifier('swin_transformer_v2', 'swinv2-tiny-w8_16xb64_in1k-256px', 256),
    classifier('t2t_vit', 't2t-vit-t-14_8xb64_in1k'),
    classifier('tinyvit', 'tinyvit-5m-distill_8xb256_in1k'),
    classifier('tnt', 'tnt-s-p16_16xb64_in1k'),
    classifier('twins', 'twins-svt-small_8xb128_in1k'),
    classifier('van', 'van-tiny_8xb128_in1k'),
    classifier('vgg', 'vgg11bn_8xb32_in1k'),
    classifier('vig', 'pvig-tiny_8xb128_in1k'),
    classifier('vision_transformer', 'vit-base-p32_64xb64_in1k'),
    classifier('wrn', 'wide-resnet50_8xb32_in1k'),
    classifier('xcit', 'xcit-nano-12-p16_8xb128_in1k'),
    Configured('mmcpd', 'seaformer', '_base_/models/seaformer_t.py', (128, 128)),
    segmentor('ann', 'ann_r50-d8_4xb2-40k_cityscapes-512x1024'),
    segmentor('apcnet', 'apcnet_r50-d8_4xb2-40k_cityscapes-512x1024'),
    segmentor('beit', 'beit-base_upernet_8xb2-160k_ade20k-640x640', model__backbone__img_size=128),
    segmentor('bisenetv1', 'bisenetv1_r18-d32-in1k-pre_4xb4-160k_cityscapes-1024x1024'),
    segmentor('bisenetv2', 'bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024'),
    segmentor('ccnet', 'ccnet_r50-d8_4xb2-40k_cityscapes-512x1024'),
    segmentor('cgnet', 'cgnet_fcn_4xb4-60k_cityscapes-680x680'),
    segmentor('convnext', 'convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512'),
    segmentor('danet', 'danet_r50-d8_4xb2-40k_cityscapes-512x1024'),
    segmentor('ddrnet', 'ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024'),
    segmentor('deeplabv3', 'deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024'),
    segmentor('deeplabv3plus', 'deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024'),
    segmentor('dmnet', 'dmnet_r50-d8_4xb2-40k_cityscapes-512x1024'),
    segmentor('dnlnet', 'dnl_r50-d8_4xb2-40k_cityscapes-512x1024'),
    segmentor('dpt', 'dpt_vit-b16_8xb2-160k_ade20k-512x512'),
    segmentor('emanet', 'emanet_r50-d8_4xb2-80k_cityscapes-512x1024'),
    segmentor('encnet', 'encnet_r50-d8_4xb2-40k_cityscapes-512x1024'),
    segmentor('erfnet', 'erfnet_fcn_4xb4-160k_cityscapes-512x1024'),
    segmentor('fastfcn', 'fastfcn_r50-d32_jpu_psp_4xb2-80k_cityscapes-512x1024'),
    segmentor('fastscnn', 'fast_scnn_8xb4-160k_cityscapes-512x1024', 256),
    segmentor('fcn', 'fcn_r18-d8_4xb2-80k_cityscapes-512x1024'),
    segmentor('gcnet', 'gcnet_r50-d8_4xb2-40k_cityscapes-512x1024'),
    segmentor('hrnet', 'fcn_hr18s_4xb2-160k_cityscapes-512x1024'),
    segmentor('icnet', 'icnet_r18-d8_4xb2-80k_cityscapes-832x832'),
    segmentor('isanet', 'isanet_r50-d8_4xb2-40k_cityscapes-512x1024'),
    segmentor('knet', 'knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512'),
    segmentor('mae', 'mae-base_upernet_8xb2-amp-160k_ade20k-512x512', model__backbone__img_size=128),
    predicting('mask2former', 'mask2former_r50_8xb2-160k_ade20k-512x512'),
    predicting('maskformer', 'maskformer_r50-d32_8xb2-160k_ade20k-512x512'),
    segmentor('mobilenet_v2', 'mobilenet-v2-d8_fcn_4xb2-80k_cityscapes-512x1024'),
    segmentor('mobilenet_v3', 'mobilenet-v3-d8-s_lraspp_4xb4-320k_cityscapes-512x1024', 512),
    segmentor('nonlocal_net', 'nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024'),
    segmentor('ocrnet', 'ocrnet_hr18s_4xb2-160k_cityscapes-512x1024'),
    segmentor('pidnet', 'pidnet-s_2xb6-120k_1024x1024-cityscapes'),
    predicting('point_rend', 'pointrend_r50_4xb4-160k_ade20k-512x512'),
    segmentor('poolformer', 'fpn_poolformer_s12_8xb4-40k_ade20k-512x512'),
    segmentor('pspnet', 'pspnet_r18-d8_4xb2-80k_cityscapes-512x1024'),
    segmentor('resnest', 'resnest_s101-d8_fcn_4xb2-80k_cityscapes-512x1024'),
    segmentor('segformer', 'segformer_mit-b0_8xb2-160k_ade20k-512x512'),
    segmentor('segmenter', 'segmenter_vit-t_mask_8xb1-160k_ade20k-512x512'),
    segmentor('segnext', 'segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512'),
    segmentor('sem_fpn', 'fpn_r50_4xb2-80k_cityscapes-512x1024'),
    segmentor(
        'setr',
        'setr_vit-l_pup_8xb2-160k_ade20k-512x512',
        model__backbone__num_layers=6,
        model__backbone__out_indices=(1, 2, 4, 5),
    ),
    segmentor('stdc', 'stdc1_4xb12-80k_cityscapes-512x1024'),
    segmentor('swin', 'swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512', 224),
    segmentor('twins', 'twins_pcpvt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512'),
    segmentor('unet', 'unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024'),
    segmentor('upernet', 'upernet_r18_4xb2-40k_cityscapes-512x1024'),
    segmentor('vit', 'vit_deit-s16_upernet_8xb2-160k_ade20k-512x512'),
)

FAMILIES: tuple[Family, ...] = (*ARCHITECTURES, *PRETRAINING, *DETECTORS, *TORCHVISION)

_LANGUAGE = 'vision and language: needs the multimodal extra and a tokenizer, and is not a vision network'

OUT: dict[str, str] = {
    'mmpretrain/blip': _LANGUAGE,
    'mmpretrain/blip2': _LANGUAGE,
    'mmpretrain/chinese_clip': _LANGUAGE,
    'mmpretrain/eva': "its targets come from a CLIP that is downloaded; the networks are beit's and mae's",
    'mmpretrain/flamingo': _LANGUAGE,
    'mmpretrain/llava': _LANGUAGE,
    'mmpretrain/milan': "its targets come from a CLIP that is downloaded; the network is mae's",
    'mmpretrain/minigpt4': _LANGUAGE,
    'mmpretrain/ofa': _LANGUAGE,
    'mmpretrain/otter': _LANGUAGE,
    'mmseg/dsdl': "a data format; the network is deeplabv3's",
    'mmseg/psanet': "needs psamask of mmcv's compiled operators, for which torchvision has no counterpart",
    'mmseg/san': 'vision and language: the names of its classes go through the text encoder of CLIP',
    'mmseg/vpd': 'depth from a diffusion model: needs the ldm package',
    **{f'mmdet/{name}': reason for name, reason in DETECTORS_OUT.items()},
}


def unlisted() -> list[str]:
    """List the config folders that neither `FAMILIES` nor `OUT` knows."""
    known = {f.key for f in FAMILIES} | set(OUT)
    found = [
        f'{package}/{folder.name}'
        for package in ('mmpretrain', 'mmseg', 'mmdet')
        for folder in sorted(config_root(package).iterdir())
        if folder.is_dir() and folder.name not in ('_base_', '__pycache__')
    ]
    return [key for key in found if key not in known]
