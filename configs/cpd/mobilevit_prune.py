# Any model of a zoo, here MobileViT, which mixes convolutions with attention over unfolded patches, in eight lines that
# work from any folder: what to train on, how long, and how far to prune.
_base_ = [
    'mmpretrain::_base_/models/mobilevit/mobilevit_xxs.py',
    'mmcpd::_base_/datasets/digits.py',
    'mmcpd::_base_/schedules/digits.py',
]
_base_.model.head.update(num_classes=10, topk=(1,))
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])
default_hooks = dict(prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=0.45, end=0.7, interval=6))
