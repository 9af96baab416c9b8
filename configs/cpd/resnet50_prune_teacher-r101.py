# resnet50_prune.py under a larger teacher, from the first iteration on. Train that first:
#     python tools/train.py configs/_base_/teachers/resnet101_digits.py
# On ImageNet, from resnet50_prune_in1k.py, OpenMMLab's own can teach:
#     teacher=dict(
#         config='mmpretrain::resnet/resnet101_8xb32_in1k.py',
#         checkpoint='https://download.openmmlab.com/mmclassification/v0/resnet/resnet101_8xb32_in1k_20210831-539c63f8.pth',
#     )
_base_ = './resnet50_prune.py'
teacher = 'work_dirs/resnet101_digits/epoch_20.pth'
model = dict(teacher=dict(config='mmcpd::_base_/teachers/resnet101_digits.py', checkpoint=teacher))
