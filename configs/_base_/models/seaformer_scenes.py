# A SeaFormer-T for scenes of 96x96: one stride less, and a narrow last stage. 11 classes, 24x24 logits.
# Trained from nothing in minutes, it starts from torch's own initialisation, and from a classifier that is not silent.
_base_ = './seaformer_t.py'
torch_init = dict(
    type='Kaiming', layer='Conv2d', a=5**0.5, mode='fan_in', nonlinearity='leaky_relu', distribution='uniform'
)
classifier_init = dict(type='Normal', std=0.07, override=dict(name='conv_seg'))
model = dict(
    data_preprocessor=dict(mean=[128] * 3, std=[77] * 3, size=(96, 96)),
    backbone=dict(
        arch=dict(
            _delete_=True,
            stem_channels=16,
            stages=[
                [[3, 1, 16, 1], [3, 4, 16, 1], [3, 3, 16, 1]],
                [[5, 3, 32, 2], [5, 3, 32, 1]],
                [[3, 3, 64, 2], [3, 3, 64, 1]],
                [[5, 3, 96, 2]],
                [[3, 4, 128, 2]],
            ],
            depths=[2, 2],
            key_dims=[16, 24],
            num_heads=[4, 4],
            mlp_ratios=[2, 4],
        ),
        drop_path_rate=0.0,
        init_cfg=torch_init,
    ),
    decode_head=dict(in_channels=[32, 96, 128], num_classes=11, init_cfg=[torch_init, classifier_init]),
)
