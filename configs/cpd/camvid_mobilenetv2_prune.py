# A segmentor on MobileNetV2, pretrained on ImageNet by OpenMMLab, on CamVid at 180x240, half of its size: 1200
# iterations dense, 600 to half of its MACs, 600 to recover. Bring your own copy of CamVid:
# data/camvid/{images,annotations}/{train,val,test}, .jpg and .png (labels 0 to 10, 255 = ignored).
_base_ = [
    '../_base_/models/mobilenetv2_light.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/scenes.py',
]
_base_.train_pipeline[2].scale = (240, 180)
_base_.train_pipeline[3].crop_size = (176, 240)
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=_base_.train_pipeline))
# Pictures are halved, labels are not: the metric is that of the full resolution.
halve = dict(type='Resize', scale=(240, 180), keep_ratio=True)
test_pipeline = [_base_.test_pipeline[0], halve, *_base_.test_pipeline[1:]]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.CWDLoss')])
default_hooks = dict(prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=0.5, end=0.75, interval=20))
optim_wrapper = dict(optimizer=dict(lr=1e-3))
