# A ResNet-50 on ImageNet, from OpenMMLab's checkpoint to half of its MACs: 20 epochs of pruning at a low rate, then
# the 100 epochs that mmpretrain trains it for, as fine-tuning with the unpruned model as the teacher. For 8 GPUs x 32:
#     tools/dist_train.sh configs/cpd/resnet50_prune_in1k.py 8
# ImageNet is looked for in data/imagenet/{train,val}/<class>/*.JPEG.
_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
load_from = 'https://download.openmmlab.com/mmclassification/v0/resnet/resnet50_8xb32_in1k_20210831-ea4938fc.pth'
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])

default_hooks = dict(
    prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=0, end=1 / 6, interval=25),
    checkpoint=dict(max_keep_ckpts=3),
)

# Rates as in MMRazor's run of Group Fisher Pruning: 0.004 while units go, then the model's own schedule.
param_scheduler = [
    dict(type='ConstantLR', factor=0.04, by_epoch=True, begin=0, end=20),
    dict(type='MultiStepLR', by_epoch=True, begin=20, end=120, milestones=[30, 60, 90], gamma=0.1),
]
train_cfg = dict(max_epochs=120)
