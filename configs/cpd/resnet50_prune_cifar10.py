# A ResNet-50 on CIFAR-10 in class folders, data/cifar10/{train,test}/<class>/*.png, in one run: 100 epochs dense,
# 40 to half of its MACs, 60 to recover.
_base_ = [
    'mmpretrain::_base_/models/resnet50_cifar.py',
    'mmpretrain::_base_/schedules/cifar10_bs128.py',
    'mmpretrain::_base_/default_runtime.py',
    '../_base_/datasets/cifar10_folders.py',
]
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])

default_hooks = dict(
    prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=0.5, end=0.7, interval=25),
    checkpoint=dict(interval=10, max_keep_ckpts=2),
)

# The dense phase ends at a low rate, so that a good model teaches; the second cycle begins at a fifth.
param_scheduler = dict(
    _delete_=True,
    type='CosineRestartLR',
    by_epoch=True,
    periods=[100, 100],
    restart_weights=[1, 0.2],
    eta_min=1e-4,
)
