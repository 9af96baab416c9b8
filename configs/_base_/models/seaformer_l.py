_base_ = './seaformer_t.py'
model = dict(
    backbone=dict(arch='large'),
    decode_head=dict(in_channels=[128, 192, 256, 320], in_index=[0, 1, 2, 3], embed_dims=[128, 160, 192], channels=192),
)
