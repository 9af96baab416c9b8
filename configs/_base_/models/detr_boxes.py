# A DETR of two encoder and three decoder layers, 96 wide, with 16 queries, on the small RetinaNet's backbone at
# stride 16.
_base_ = './retinanet_boxes.py'
attention = dict(embed_dims=96, num_heads=4, dropout=0.0, batch_first=True)
ffn_cfg = dict(
    embed_dims=96, feedforward_channels=192, num_fcs=2, ffn_drop=0.0, act_cfg=dict(type='ReLU', inplace=True)
)
model = dict(
    type='DETR',
    num_queries=16,
    backbone=dict(strides=(1, 2, 2, 1), out_indices=(3,)),
    neck=dict(
        _delete_=True,
        type='ChannelMapper',
        in_channels=[128],
        kernel_size=1,
        out_channels=96,
        act_cfg=None,
        norm_cfg=None,
        num_outs=1,
    ),
    encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn_cfg)),
    decoder=dict(
        num_layers=3,
        layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn_cfg),
        return_intermediate=True,
    ),
    positional_encoding=dict(num_feats=48, normalize=True),
    bbox_head=dict(
        _delete_=True,
        type='DETRHead',
        num_classes=10,
        embed_dims=96,
        loss_cls=dict(type='CrossEntropyLoss', bg_cls_weight=0.1, use_sigmoid=False, loss_weight=1.0, class_weight=1.0),
        loss_bbox=dict(type='L1Loss', loss_weight=5.0),
        loss_iou=dict(type='GIoULoss', loss_weight=2.0),
    ),
    train_cfg=dict(
        _delete_=True,
        assigner=dict(
            type='HungarianAssigner',
            match_costs=[
                dict(type='ClassificationCost', weight=1.0),
                dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                dict(type='IoUCost', iou_mode='giou', weight=2.0),
            ],
        ),
    ),
    test_cfg=dict(_delete_=True, max_per_img=16),
)
