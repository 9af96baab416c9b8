# A MobileNetV2 on ImageNet, from OpenMMLab's checkpoint (71.86 top-1, 0.3 GMACs) to half of its MACs: 20 epochs of
# pruning at a low rate, then the 300 epochs that mmpretrain trains it for, as fine-tuning. For 8 GPUs x 32:
#     tools/dist_train.sh configs/cpd/mobilenetv2_prune_in1k.py 8
# ImageNet is looked for in data/imagenet/{train,val}/<class>/*.JPEG.
_base_ = 'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py'
load_from = 'https://download.openmmlab.com/mmclassification/v0/mobilenet_v2/mobilenet_v2_batch256_imagenet_20200708-3b2dc3af.pth'
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])

default_hooks = dict(
    prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=0, end=1 / 16, interval=25),
    checkpoint=dict(max_keep_ckpts=3),
)

param_scheduler = [
    dict(type='ConstantLR', factor=0.04, by_epoch=True, begin=0, end=20),
    dict(type='StepLR', by_epoch=True, begin=20, end=320, step_size=1, gamma=0.98),
]
train_cfg = dict(max_epochs=320)
