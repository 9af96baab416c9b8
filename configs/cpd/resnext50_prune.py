# A ResNeXt-50 on the embedded digits: 9 epochs dense, 5 to 4.31x fewer MACs, 6 to recover. Inside a grouped
# convolution a unit is a whole group, of 4 to 32 channels.
_base_ = [
    'mmpretrain::_base_/models/resnext50_32x4d.py',
    '../_base_/datasets/digits.py',
    '../_base_/schedules/digits.py',
    '../_base_/cpd.py',
    '../_base_/kd.py',
]
_base_.model.head.num_classes = 10
_base_.model.head.topk = (1,)
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=_base_.losses)

custom_hooks = [dict(type='mmcpd.CombHook'), dict(type='mmcpd.PruneHook')]
prune = dict(begin=0.45, end=0.7, target=1 / 4.31, interval=6, round_to=4)
