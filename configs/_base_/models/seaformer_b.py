_base_ = './seaformer_t.py'
model = dict(
    backbone=dict(arch='base'),
    decode_head=dict(in_channels=[64, 192, 256], embed_dims=[128, 160], channels=160),
)
