# SYNTHETIC detection scenes composed of scikit-learn's digits, 10 classes: nothing to download. The metrics are called
# `synthetic/bbox_mAP` and so on, so that no figure passes for one on photographs.
# As in mmdet, the model's config holds the data_preprocessor: mean [128] * 3, std [77] * 3.
dataset_type = 'mmcpd.DigitBoxesDataset'

train_pipeline = [dict(type='mmdet.PackDetInputs', meta_keys=('img_id', 'ori_shape', 'img_shape', 'scale_factor'))]
# The metric makes its annotations of the instances.
test_pipeline = [dict(train_pipeline[0], meta_keys=('img_id', 'ori_shape', 'img_shape', 'scale_factor', 'instances'))]

# No workers: a scene takes a few ms, and two cores are better spent on the model.
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type=dataset_type, split='train', length=4000, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type=dataset_type, split='val', length=200, pipeline=test_pipeline, test_mode=True),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='mmdet.CocoMetric', metric='bbox', prefix='synthetic')
test_evaluator = val_evaluator
