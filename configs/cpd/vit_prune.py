# A vision transformer with UPerNet on the embedded scenes, which are SYNTHETIC: digits on mottled paper. 480
# iterations dense, 360 to 60 % of its parameters, 360 to recover.
_base_ = [
    '../_base_/models/upernet_vit_scenes.py',
    '../_base_/datasets/digit_scenes.py',
    '../_base_/schedules/scenes.py',
    '../_base_/cpd.py',
    '../_base_/cwd.py',
]
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=_base_.losses)

custom_hooks = [dict(type='mmcpd.CombHook'), dict(type='mmcpd.PruneHook')]
prune = dict(begin=0.4, end=0.7, target=0.6, metric='params', interval=20, round_to=8)
