# A ResNeXt-50 on the embedded digits: 9 epochs dense, 5 to 4.31x fewer MACs, 6 to recover. Inside a grouped
# convolution a unit is a whole group, of 4 to 32 channels.
_base_ = [
    'mmpretrain::_base_/models/resnext50_32x4d.py',
    '../_base_/datasets/digits.py',
    '../_base_/schedules/digits.py',
]
_base_.model.head.num_classes = 10
_base_.model.head.topk = (1,)
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])

default_hooks = dict(
    prune=dict(type='mmcpd.PruneHook', target=dict(macs=1 / 4.31), begin=0.45, end=0.7, interval=6, round_to=4)
)
