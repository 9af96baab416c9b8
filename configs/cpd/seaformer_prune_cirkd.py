# The small SeaFormer on SYNTHETIC scenes, taught relations between the pixels of all images. The queues take 17 MB.
_base_ = './seaformer_prune.py'
cirkd = dict(type='mmcpd.CIRKDLoss', tap='decode_head.conv_seg:in', pixel_queue=2000, region_queue=2000)
model = dict(losses=[dict(type='mmcpd.KDLoss', tap='logits'), cirkd])
