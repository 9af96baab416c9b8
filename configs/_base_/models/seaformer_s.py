_base_ = './seaformer_t.py'
model = dict(
    backbone=dict(arch='small'),
    decode_head=dict(in_channels=[48, 160, 192], embed_dims=[96, 128], channels=128),
)
