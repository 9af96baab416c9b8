# An FCOS-R50 on COCO, from OpenMMLab's checkpoint (38.7 AP) to half of its MACs: 4 of its 12 epochs
# of pruning, then 8 to recover. The first stage of its backbone and all batch norms are frozen: what that holds back
# the run says. For 8 GPUs x 2:
#     tools/dist_train.sh configs/cpd/fcos_r50_prune_coco.py 8
# COCO is looked for in data/coco/{train2017,val2017,annotations}.
_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py'
load_from = (
    'https://download.openmmlab.com/mmdetection/v2.0/fcos/'
    'fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco/'
    'fcos_center-normbbox-centeronreg-giou_r50_caffe_fpn_gn-head_1x_coco-0a0d75a8.pth'
)
_base_.model.backbone.init_cfg = None  # what is loaded is trained
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])

default_hooks = dict(
    prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=0, end=1 / 3, interval=25),
    checkpoint=dict(max_keep_ckpts=3),
)
