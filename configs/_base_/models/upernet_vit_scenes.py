# UPerNet on a small vision transformer for scenes of 64x64: 4 blocks of 64, patches of 8. 11 classes, 16x16 logits.
_base_ = 'mmseg::_base_/models/upernet_vit-b16_ln_mln.py'
widths = [64] * 4
model = dict(
    data_preprocessor=dict(mean=[128] * 3, std=[77] * 3, size=(64, 64)),
    pretrained=None,
    backbone=dict(
        img_size=(64, 64),
        patch_size=8,
        embed_dims=64,
        num_layers=4,
        num_heads=4,
        out_indices=(0, 1, 2, 3),
        final_norm=True,
    ),
    neck=dict(in_channels=widths, out_channels=64, scales=[2, 1, 0.5, 0.25]),
    decode_head=dict(
        in_channels=widths,
        channels=48,
        pool_scales=(1, 2, 3),
        num_classes=11,
        init_cfg=dict(type='Normal', std=0.07, override=dict(name='conv_seg')),  # not silent at first
    ),
    # It helps to train large models from nothing, and is no part of what is tested, slimmed and exported.
    auxiliary_head=None,
)
