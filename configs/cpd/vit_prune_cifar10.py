# A small trained vision transformer to half of its MACs at once, as resnet20_prune_cifar10.py says. First the basis of
# each attention head is rotated, which changes no output, so that the dimensions that carry little can go.
_base_ = [
    '../_base_/models/vit_cifar.py',
    '../_base_/datasets/cifar10_folders.py',
    'mmpretrain::_base_/schedules/cifar10_bs128.py',
    'mmpretrain::_base_/default_runtime.py',
]
load_from = 'checkpoints/vit_cifar10.pth'
losses = [dict(type='mmcpd.KDLoss')]
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=losses, task_weight=0)
default_hooks = dict(prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), at_once=True, round_to=1))

optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(max_epochs=10)
