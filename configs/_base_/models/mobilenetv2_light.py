# MobileNetV2 with SeaFormer's Light head: 0.3 GMACs at 180x240, logits at 1/8.
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='mmseg.EncoderDecoder',
    data_preprocessor=dict(
        type='mmseg.SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(176, 240),
    ),
    backbone=dict(
        type='mmseg.MobileNetV2',
        out_indices=(2, 4, 6),
        norm_cfg=norm_cfg,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/mobilenet_v2/'
            'mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth',
            prefix='backbone.',
        ),
    ),
    decode_head=dict(
        type='mmcpd.LightHead',
        in_channels=[32, 96, 320],
        in_index=[0, 1, 2],
        embed_dims=[96, 128],
        channels=128,
        num_classes=11,
        dropout_ratio=0.1,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='mmseg.CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
