"""Import the MMEngine layer first: where mmcv has no compiled operators, mmseg needs the stand-in for them."""

from mmcpd.compat import imported

imported('mmcpd.engine')
