"""A package, so that `tests.helpers` is this one's and not that of another distribution.

The MMEngine layer is imported first, in the processes that tests start too: where mmcv has no compiled operators, mmseg
needs the stand-in for them.
"""

from mmcpd.compat import imported

imported('mmcpd.engine')
