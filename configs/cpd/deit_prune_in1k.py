# A DeiT-S on ImageNet, from OpenMMLab's checkpoint (80.69 top-1, 4.6 GMACs) to half of its MACs: 20 epochs of pruning
# at a low rate, then the 300 epochs that mmpretrain trains it for, as fine-tuning. For 4 GPUs x 256:
#     tools/dist_train.sh configs/cpd/deit_prune_in1k.py 4
# ImageNet is looked for in data/imagenet/{train,val}/<class>/*.JPEG.
_base_ = 'mmpretrain::deit/deit-small_4xb256_in1k.py'
load_from = 'https://download.openmmlab.com/mmclassification/v0/deit/deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth'
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])

default_hooks = dict(
    prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=0, end=1 / 16, interval=25),
    checkpoint=dict(max_keep_ckpts=3),
)

param_scheduler = [
    dict(type='ConstantLR', factor=0.04, by_epoch=True, begin=0, end=20),
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=20, end=40, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=40, end=320),
]
train_cfg = dict(max_epochs=320)
