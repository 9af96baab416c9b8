# A trained ResNet-20 to half of its MACs at once, before training: scored, chosen and refitted on 512 pictures. Then 10
# epochs in which only the unpruned model teaches: no label is read. CIFAR-10 is looked for in class folders,
# data/cifar10/{train,test}/<class>/*.png, and the dense weights where load_from says.
_base_ = [
    '../_base_/models/resnet20_cifar.py',
    '../_base_/datasets/cifar10_folders.py',
    'mmpretrain::_base_/schedules/cifar10_bs128.py',
    'mmpretrain::_base_/default_runtime.py',
]
load_from = 'checkpoints/resnet20_cifar10.pth'
losses = [dict(type='mmcpd.KDLoss')]
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=losses, task_weight=0)
default_hooks = dict(prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), at_once=True, round_to=1))

# A refitted model is nearly as good as the dense one: a tenth of the rate of training, and less for deeper nets.
optim_wrapper = dict(optimizer=dict(lr=0.01))
param_scheduler = dict(_delete_=True, type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(max_epochs=10)
