"""Show coupling groups: this is `mmcpd comb`."""

import sys

from mmcpd.__main__ import main

if __name__ == '__main__':
    main(['comb', *sys.argv[1:]])
