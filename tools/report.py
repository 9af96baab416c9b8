"""Write the report of a run: this is `mmcpd report`."""

import sys

from mmcpd.__main__ import main

if __name__ == '__main__':
    main(['report', *sys.argv[1:]])
