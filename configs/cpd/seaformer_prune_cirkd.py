# The small SeaFormer on SYNTHETIC scenes, taught relations between the pixels of all images. The queues take 17 MB. The
# authors keep 20,000 pixels per class: at 150 classes of 256 channels that is 3.4 GB, on the GPU and in every
# checkpoint; 2,000 is 0.6 GB with the regions. The number of classes and the width come from the student.
_base_ = './seaformer_prune.py'
cirkd = dict(type='mmcpd.CIRKDLoss', tap='decode_head.conv_seg:in', pixel_queue=2000, region_queue=2000)
# Its weights are the authors', for a KD at temperature 1.
model = dict(losses=[dict(type='mmcpd.KDLoss', tap='logits', tau=1.0), cirkd])
