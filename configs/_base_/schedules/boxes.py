# A short run of a detector: 1200 iterations dense with a rate that falls to nothing, then a second fall from half the
# rate over 1200 in which units go and the rest recovers (PruneHook's begin=0.5, end=0.75).
_base_ = "mmdet::_base_/default_runtime.py"
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type='CosineRestartLR',
        by_epoch=False,
        begin=50,
        periods=[1150, 1200],
        restart_weights=[1, 0.5],
        eta_min=1e-5,
    ),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2400, val_interval=400)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=400, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
randomness = dict(seed=0)
