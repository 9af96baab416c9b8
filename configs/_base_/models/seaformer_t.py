# SeaFormer-T with the Light head, 150 classes: 1.7 M parameters, 0.6 GMACs at 512x512.
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
        size=(512, 512),
    ),
    backbone=dict(type='mmcpd.SeaFormer', arch='tiny', drop_path_rate=0.1, norm_cfg=norm_cfg),
    decode_head=dict(
        type='mmcpd.LightHead',
        in_channels=[32, 128, 160],
        in_index=[0, 1, 2],
        embed_dims=[64, 96],
        channels=96,
        num_classes=150,
        dropout_ratio=0.1,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='mmseg.CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
