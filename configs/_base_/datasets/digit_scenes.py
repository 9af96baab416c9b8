# SYNTHETIC segmentation scenes composed of scikit-learn's digits, 11 classes: nothing to download. The metrics are
# called `synthetic/mIoU` and so on, so that no figure passes for one on photographs.
# As in mmseg, the model's config holds the data_preprocessor: size=crop_size, mean [128] * 3, std [77] * 3.
dataset_type = 'mmcpd.DigitScenesDataset'
crop_size = (96, 96)
# Few and large digits, so that small models learn them in minutes.
digits = dict(count=(1, 3), scale=(0.6, 0.9))
# Three quarters of the pixels are background; a loss that weighs them less finds the digits sooner.
class_weight = [0.2] + [1.0] * 10

pipeline = [dict(type='mmseg.PackSegInputs')]

# No workers: a scene takes 2 ms, and two cores are better spent on the model.
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type=dataset_type, split='train', length=2000, size=crop_size, **digits, pipeline=pipeline),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type, split='val', length=200, size=crop_size, **digits, pipeline=pipeline, test_mode=True
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='mmseg.IoUMetric', iou_metrics=['mIoU'], prefix='synthetic')
test_evaluator = val_evaluator
