"""Prune a trained model without training: this is `mmcpd prune`."""

import sys

from mmcpd.__main__ import main

if __name__ == '__main__':
    main(['prune', *sys.argv[1:]])
