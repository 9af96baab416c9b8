# A ResNet-50 on the embedded digits in one run: 9 epochs dense, 5 to half of its MACs, 6 to recover. From the tenth on
# the dense model is the teacher.
_base_ = [
    'mmpretrain::_base_/models/resnet50.py',
    '../_base_/datasets/digits.py',
    '../_base_/schedules/digits.py',
]
_base_.model.head.num_classes = 10
_base_.model.head.topk = (1,)
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])

default_hooks = dict(prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=0.45, end=0.7, interval=6))
