# A small SeaFormer with its Light head on the embedded scenes, which are SYNTHETIC: digits on mottled paper. 1200
# iterations dense, 600 to half of its MACs, 600 to recover.
_base_ = [
    '../_base_/models/seaformer_scenes.py',
    '../_base_/datasets/digit_scenes.py',
    '../_base_/schedules/scenes.py',
]
_base_.model.decode_head.loss_decode.class_weight = _base_.class_weight
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.CWDLoss')])

default_hooks = dict(prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=0.5, end=0.75, interval=20))
