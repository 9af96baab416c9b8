"""Test a config's model: this is `mmcpd test`."""

import sys

from mmcpd.__main__ import main

if __name__ == '__main__':
    main(['test', *sys.argv[1:]])
