# SeaFormer-L on ADE20K to 80 % of its units, as the paper's released code counts: 80,000 iterations of pruning and
# fine-tuning. For 8 GPUs x 2:
#     tools/dist_train.sh configs/cpd/seaformer_prune_ade20k.py 8 --cfg-options load_from=SeaFormer_L.pth
# OpenMMLab publishes no SeaFormer: download the ADE20K checkpoint of SeaFormer-L from the authors' repository, whose
# names of weights are ours, and give its path as load_from.
# ADE20K is looked for in data/ade/ADEChallengeData2016/{images,annotations}/{training,validation}.
_base_ = [
    '../_base_/models/seaformer_l.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_80k.py',
]
load_from = 'data/seaformer_l_ade20k.pth'
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.CWDLoss')])

default_hooks = dict(
    prune=dict(type='mmcpd.PruneHook', target=dict(units=0.8), begin=0, end=0.5, interval=50),
    checkpoint=dict(interval=2000, max_keep_ckpts=3),
)

# The authors' optimizer, at half of its rate for half of its batch.
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2.5e-4, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={'pos_emb': dict(decay_mult=0.0), 'decode_head': dict(lr_mult=10.0)},
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=80000),
]
train_dataloader = dict(batch_size=2)
train_cfg = dict(val_interval=2000)
