# A small SeaFormer with its Light head on the embedded scenes, which are SYNTHETIC: digits on mottled paper. 1200
# iterations dense, 600 to half of its MACs, 600 to recover.
_base_ = [
    '../_base_/models/seaformer_scenes.py',
    '../_base_/datasets/digit_scenes.py',
    '../_base_/schedules/scenes.py',
    '../_base_/cpd.py',
    '../_base_/cwd.py',
]
_base_.model.decode_head.loss_decode.class_weight = _base_.class_weight
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=_base_.losses)

custom_hooks = [dict(type='mmcpd.CombHook'), dict(type='mmcpd.PruneHook')]
prune = dict(begin=0.5, end=0.75, target=0.5, interval=20, round_to=8)
