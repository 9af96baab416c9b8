# A ResNet-50 on the embedded digits in one run: 9 epochs dense, 5 to half of its MACs taught by itself, 6 to recover.
_base_ = [
    'mmpretrain::_base_/models/resnet50.py',
    '../_base_/datasets/digits.py',
    '../_base_/schedules/digits.py',
    '../_base_/cpd.py',
    '../_base_/kd.py',
]
_base_.model.head.num_classes = 10
_base_.model.head.topk = (1,)
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=_base_.losses)

custom_hooks = [dict(type='mmcpd.CombHook'), dict(type='mmcpd.PruneHook')]
prune = dict(begin=0.45, end=0.7, target=0.5, interval=6, round_to=8)
