"""Find what other hooks switched in a model while it trained: settings of its loss, which no weights file holds.

MMDetection's `YOLOXModeSwitchHook` adds a loss for the last epochs, MMPretrain's `SwitchRecipeHook` puts another loss
in the place of the config's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from mmcpd.slim.copying import is_plain
from mmcpd.slim.references import plain_attributes


def switched(built: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Return what a trained model has set otherwise than one that was just built, both dense, by its name.

    These are plain values in public attributes, and modules without tensors whose class is another one.

    Example:
        >>> switched(nn.Sequential(nn.Dropout(0.1)), nn.Sequential(nn.Dropout(0.5)))
        {'0.p': 0.5}
    """
    found: dict[str, Any] = {}
    paths = dict(built.named_modules())
    for path, module in model.named_modules():
        twin = paths.get(path)
        if twin is None or any(path.startswith(f'{above}.') for above in found):
            continue
        if type(twin) is not type(module):
            if path and not twin.state_dict() and not module.state_dict():
                found[path] = module
            continue
        before = plain_attributes(twin)
        for name, value in plain_attributes(module).items():
            both = name in before and is_plain(value) and is_plain(before[name])
            if both and not name.startswith('_') and before[name] != value and value == value:  # NaN is no switch
                found[f'{path}.{name}'.lstrip('.')] = value
    return found


def switch_(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Put what `switched` returned into another model, as copies."""
    for name, value in settings.items():
        path, _, local = name.rpartition('.')
        setattr(model.get_submodule(path), local, copy.deepcopy(value))
