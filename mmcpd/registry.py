"""mmcpd's nodes in MMEngine's registry tree, where MMEngine looks for them by this file's name.

Without them each component that a config inherits by `mmcpd::` would be built with a warning that its scope is unknown.
The nodes stay empty: what is not found in them is looked for in the root, where mmcpd registers.
"""

from __future__ import annotations

import mmengine.registry as root

NODES = [
    root.Registry(node.name, parent=node, scope='mmcpd')
    for node in list(vars(root).values())
    if isinstance(node, root.Registry) and node.parent is None
]
