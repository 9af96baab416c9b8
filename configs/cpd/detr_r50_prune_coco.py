# A DETR-R50 on COCO, from OpenMMLab's checkpoint (39.9 AP) to half of its MACs: 10 of its 150 epochs
# of pruning, then 140 to recover. The first stage of its backbone and all batch norms are frozen: what that holds back
# the run says. For 8 GPUs x 2:
#     tools/dist_train.sh configs/cpd/detr_r50_prune_coco.py 8
# COCO is looked for in data/coco/{train2017,val2017,annotations}.
_base_ = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'
load_from = (
    'https://download.openmmlab.com/mmdetection/v3.0/detr/detr_r50_8xb2-150e_coco/'
    'detr_r50_8xb2-150e_coco_20221023_153551-436d03e8.pth'
)
_base_.model.backbone.init_cfg = None  # what is loaded is trained
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])

default_hooks = dict(
    prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=0, end=1 / 15, interval=25),
    checkpoint=dict(max_keep_ckpts=3),
)
