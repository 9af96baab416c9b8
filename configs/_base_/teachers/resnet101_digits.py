# A ResNet-101 on the embedded digits, unpruned, to teach smaller ones:
#     python tools/train.py configs/_base_/teachers/resnet101_digits.py
_base_ = ['mmpretrain::_base_/models/resnet101.py', '../datasets/digits.py', '../schedules/digits.py']
model = dict(head=dict(num_classes=10, topk=(1,)))
