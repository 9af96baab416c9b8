# A RetinaNet on a quarter of a ResNet-18's widths for scenes of 128x128, with three levels. Trained from nothing: no
# stage is frozen, and batch norms are trained.
_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'
model = dict(
    data_preprocessor=dict(mean=[128] * 3, std=[77] * 3),
    backbone=dict(depth=18, base_channels=16, stem_channels=16, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=48, num_outs=3, norm_cfg=dict(type='BN')),
    bbox_head=dict(
        num_classes=10,
        in_channels=48,
        feat_channels=48,
        stacked_convs=2,
        norm_cfg=dict(type='BN'),
        anchor_generator=dict(strides=[8, 16, 32]),
    ),
)
