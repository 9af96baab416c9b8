# The small SeaFormer on SYNTHETIC scenes, taught where each class is: the distiller that seaformer_prune.py has too.
_base_ = './seaformer_prune.py'
model = dict(losses=[dict(type='mmcpd.CWDLoss', tap='decode_head.conv_seg', tau=4.0, loss_weight=3.0)])
