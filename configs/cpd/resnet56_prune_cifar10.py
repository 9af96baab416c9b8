# A trained ResNet-56 to half of its MACs at once, as resnet20_prune_cifar10.py does; at a lower rate.
_base_ = './resnet20_prune_cifar10.py'
load_from = 'checkpoints/resnet56_cifar10.pth'
model = dict(student=dict(backbone=dict(depth=56)))
optim_wrapper = dict(optimizer=dict(lr=0.003))
