# A vision transformer with UPerNet on the embedded scenes, which are SYNTHETIC: digits on mottled paper. 1200
# iterations dense, 600 to 60 % of its parameters, 600 to recover. A transformer that starts from nothing needs many
# scenes: they are smaller here, and twice as many in an iteration.
_base_ = [
    '../_base_/models/upernet_vit_scenes.py',
    '../_base_/datasets/digit_scenes.py',
    '../_base_/schedules/scenes.py',
]
_base_.model.decode_head.loss_decode.class_weight = _base_.class_weight
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.CWDLoss')])

train_dataloader = dict(batch_size=32, dataset=dict(size=(64, 64)))
val_dataloader = dict(dataset=dict(size=(64, 64)))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=2e-3))
default_hooks = dict(prune=dict(type='mmcpd.PruneHook', target=dict(params=0.6), begin=0.5, end=0.75, interval=20))
