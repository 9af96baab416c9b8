# The ResNet-20 of He et al. for pictures of 32x32: 0.27 M parameters, 41 M MACs. depth=56: 0.86 M and 126 M.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmcpd.CIFARResNet', depth=20),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=64, loss=dict(type='CrossEntropyLoss'), topk=(1,)),
)
