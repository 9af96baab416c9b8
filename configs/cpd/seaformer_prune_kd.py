# The small SeaFormer on SYNTHETIC scenes, taught class probabilities pixel by pixel.
_base_ = './seaformer_prune.py'
model = dict(losses=[dict(type='mmcpd.KDLoss', tap='logits', tau=4.0, loss_weight=1.0)])
