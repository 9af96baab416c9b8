"""Cut a slim.pth: this is `mmcpd slim`."""

import sys

from mmcpd.__main__ import main

if __name__ == '__main__':
    main(['slim', *sys.argv[1:]])
