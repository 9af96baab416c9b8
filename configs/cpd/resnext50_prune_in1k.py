# A ResNeXt-50 32x4d on ImageNet, from OpenMMLab's checkpoint (77.90 top-1, 4.27 GMACs) to 4.31x fewer MACs: 20 epochs
# of pruning at a low rate, then the 100 epochs that mmpretrain trains it for, as fine-tuning. For 8 GPUs x 32:
#     tools/dist_train.sh configs/cpd/resnext50_prune_in1k.py 8
# ImageNet is looked for in data/imagenet/{train,val}/<class>/*.JPEG.
_base_ = 'mmpretrain::resnext/resnext50-32x4d_8xb32_in1k.py'
load_from = (
    'https://download.openmmlab.com/mmclassification/v0/resnext/resnext50_32x4d_b32x8_imagenet_20210429-56066e27.pth'
)
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])

# Inside a grouped convolution a unit is a whole group, of 4 to 32 channels.
default_hooks = dict(
    prune=dict(type='mmcpd.PruneHook', target=dict(macs=1 / 4.31), begin=0, end=1 / 6, interval=25, round_to=4),
    checkpoint=dict(max_keep_ckpts=3),
)

param_scheduler = [
    dict(type='ConstantLR', factor=0.04, by_epoch=True, begin=0, end=20),
    dict(type='MultiStepLR', by_epoch=True, begin=20, end=120, milestones=[30, 60, 90], gamma=0.1),
]
train_cfg = dict(max_epochs=120)
