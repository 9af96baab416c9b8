# DeiT-S with UPerNet on ADE20K, from OpenMMLab's checkpoint (42.96 mIoU) to 60 % of its units, as the paper's released
# code counts: 80,000 iterations of pruning and fine-tuning in one schedule, with the rate and the intervals of its
# configs. For 4 GPUs x 2:
#     tools/dist_train.sh configs/cpd/vit_prune_ade20k.py 4
# ADE20K is looked for in data/ade/ADEChallengeData2016/{images,annotations}/{training,validation}.
_base_ = 'mmseg::vit/vit_deit-s16_upernet_8xb2-80k_ade20k-512x512.py'
load_from = (
    'https://download.openmmlab.com/mmsegmentation/v0.5/vit/upernet_deit-s16_512x512_80k_ade20k/'
    'upernet_deit-s16_512x512_80k_ade20k_20210624_095228-afc93ec2.pth'
)
# What is loaded is trained. The auxiliary head is no part of what is tested, slimmed and exported.
_base_.model.update(pretrained=None, auxiliary_head=None)
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.CWDLoss')])

default_hooks = dict(
    prune=dict(type='mmcpd.PruneHook', target=dict(units=0.6), begin=0, end=0.5, interval=50),
    checkpoint=dict(interval=2000, max_keep_ckpts=3),
)

optim_wrapper = dict(optimizer=dict(lr=3e-5))
train_cfg = dict(val_interval=2000)
