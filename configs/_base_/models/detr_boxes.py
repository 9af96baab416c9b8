# A Deformable DETR of two encoder and three decoder layers, 96 wide, with 20 queries, on three levels of the small
# RetinaNet's backbone. It samples the picture where its boxes are, and refines them from layer to layer; a plain DETR
# of this size learns nothing in minutes.
_base_ = './retinanet_boxes.py'
attention = dict(embed_dims=96, num_heads=4, dropout=0.0)
deformable_attention = dict(num_levels=3, **attention)
ffn_cfg = dict(embed_dims=96, feedforward_channels=192, ffn_drop=0.0)
model = dict(
    type='DeformableDETR',
    num_queries=20,
    with_box_refine=True,
    backbone=dict(out_indices=(1, 2, 3)),
    neck=dict(
        _delete_=True,
        type='ChannelMapper',
        in_channels=[32, 64, 128],
        kernel_size=1,
        out_channels=96,
        act_cfg=None,
        norm_cfg=dict(type='GN', num_groups=8),
        num_outs=3,
    ),
    encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=deformable_attention, ffn_cfg=ffn_cfg)),
    decoder=dict(
        num_layers=3,
        return_intermediate=True,
        post_norm_cfg=None,
        layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=deformable_attention, ffn_cfg=ffn_cfg),
    ),
    positional_encoding=dict(num_feats=48, normalize=True, temperature=20),
    bbox_head=dict(
        _delete_=True,
        type='DeformableDETRHead',
        num_classes=10,
        embed_dims=96,
        sync_cls_avg_factor=True,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='GIoULoss', loss_weight=2.0),
    ),
    train_cfg=dict(
        _delete_=True,
        assigner=dict(
            type='HungarianAssigner',
            match_costs=[
                dict(type='FocalLossCost', weight=2.0),
                dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                dict(type='IoUCost', iou_mode='giou', weight=2.0),
            ],
        ),
    ),
    test_cfg=dict(_delete_=True, max_per_img=20),
)
