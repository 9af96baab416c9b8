# Channel-wise distillation, for segmentors. Temperature and weight are those of its authors' command.
losses = [dict(type='mmcpd.CWDLoss', tap='decode_head.conv_seg', tau=4.0, loss_weight=3.0)]
