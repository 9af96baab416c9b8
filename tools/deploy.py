"""Export to ONNX and measure: this is `mmcpd deploy`."""

import sys

from mmcpd.__main__ import main

if __name__ == '__main__':
    main(['deploy', *sys.argv[1:]])
