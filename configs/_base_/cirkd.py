# Cross-image relational distillation, for segmentors: on the features before the classifier, beside KD on its logits.
# The number of classes and the width come from the student. The authors keep 20,000 pixels per class: at 150 classes
# of 256 channels that is 3.4 GB, on the GPU and in every checkpoint; 2,000 is 0.6 GB with the regions.
losses = [
    dict(type='mmcpd.KDLoss', tap='logits', tau=1.0, loss_weight=1.0),
    dict(
        type='mmcpd.CIRKDLoss',
        tap='decode_head.conv_seg:in',
        alpha=1.0,
        beta=0.1,
        gamma=0.1,
        tau=0.1,
        temperature=1.0,
        pixel_queue=2000,
        region_queue=2000,
    ),
]
