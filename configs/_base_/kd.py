# Class probabilities, for any classifier or segmentor. The paper's weight and temperature are not known: 1 and 1.
losses = [dict(type='mmcpd.KDLoss', tap='logits', tau=1.0, loss_weight=1.0)]
