# A short run on the digits, 22 iterations an epoch: 9 epochs dense with a rate that falls to nothing, then a second
# fall from half the rate over 11 epochs in which units go and the rest recovers (PruneHook's begin=0.45, end=0.7).
_base_ = 'mmpretrain::_base_/default_runtime.py'
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=2, convert_to_iter_based=True),
    dict(
        type='CosineRestartLR',
        begin=2,
        periods=[7, 11],
        restart_weights=[1, 0.5],
        eta_min=1e-4,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(logger=dict(interval=22), checkpoint=dict(interval=4, max_keep_ckpts=2))
randomness = dict(seed=0)
