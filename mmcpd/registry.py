"""mmcpd's nodes in MMEngine's registry tree, where MMEngine looks for them by this file's name.

`type='mmcpd.PruneHook'` in a config makes MMEngine import this file, in any process, and then the modules in
`LOCATIONS`, which register what mmcpd adds. Each registry has a node, also those to which mmcpd adds nothing: what a
config inherits by `_base_ = 'mmcpd::...'` is built in the scope `mmcpd`, and looked for in its parent, the root.
"""

from __future__ import annotations

import mmengine.registry as root
from mmengine.registry import Registry

LOCATIONS = ['mmcpd.engine']
NODES = {
    parent.name: Registry(parent.name, parent=parent, scope='mmcpd', locations=LOCATIONS)
    for parent in list(vars(root).values())
    if isinstance(parent, Registry) and parent.parent is None
}
DATASETS, HOOKS, MODELS = (NODES[parent.name] for parent in (root.DATASETS, root.HOOKS, root.MODELS))
