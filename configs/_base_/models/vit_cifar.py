# A small vision transformer for pictures of 32x32, 64 tokens of overlapping patches: 1.8 M parameters, 125 M MACs.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=192, num_layers=6, num_heads=3, feedforward_channels=384),
        img_size=32,
        patch_size=4,
        patch_cfg=dict(kernel_size=8, stride=4, padding=2),
        out_type='avg_featmap',
        with_cls_token=False,
    ),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=192, loss=dict(type='CrossEntropyLoss'), topk=(1,)),
)
