"""Train a model by its config: this is `mmcpd train`."""

import sys

from mmcpd.__main__ import main

if __name__ == '__main__':
    main(['train', *sys.argv[1:]])
