# An RTMDet-s on COCO, from OpenMMLab's checkpoint (44.5 AP) to half of its MACs: 20 of its 300 epochs
# of pruning, then 280 to recover. What is validated, saved and slimmed is the average of the weights that its EMAHook
# keeps. For 8 GPUs x 32:
#     tools/dist_train.sh configs/cpd/rtmdet_s_prune_coco.py 8
# COCO is looked for in data/coco/{train2017,val2017,annotations}.
_base_ = 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'
load_from = (
    'https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet_s_8xb32-300e_coco/'
    'rtmdet_s_8xb32-300e_coco_20220905_161602-387a891e.pth'
)
_base_.model.backbone.init_cfg = None  # what is loaded is trained
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])

default_hooks = dict(
    prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=0, end=1 / 15, interval=25),
    checkpoint=dict(max_keep_ckpts=3),
)
