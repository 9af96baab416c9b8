# A small Deformable DETR on the embedded scenes with boxes, which are SYNTHETIC: digits on mottled paper. 800
# iterations dense, 400 to half of its MACs, 400 to recover.
_base_ = ['../_base_/models/detr_boxes.py', '../_base_/datasets/digit_boxes.py', '../_base_/schedules/boxes.py']
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])

optim_wrapper = dict(optimizer=dict(lr=5e-4), clip_grad=dict(max_norm=1.0))
default_hooks = dict(prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=0.5, end=0.75, interval=20))
