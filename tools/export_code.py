"""Write a slim model as plain code: this is `mmcpd export-code`."""

import sys

from mmcpd.__main__ import main

if __name__ == '__main__':
    main(['export-code', *sys.argv[1:]])
