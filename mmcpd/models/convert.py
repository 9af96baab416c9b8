"""Read the authors' SeaFormer checkpoints, whatever dictionary the weights are wrapped in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

# Outer keys, the wanted one first: a training run that keeps an average publishes the average's accuracy.
OUTER_KEYS = ('state_dict_ema', 'state_dict', 'model')


def backbone_state_dict(checkpoint: Mapping[str, Any], prefix: str | None = None) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, without the outer key, 'module.' and the backbone's prefix.

    Args:
        checkpoint: As `torch.load` gives it.
        prefix: Keep only the keys that begin so, and cut it off. By default 'backbone' where such keys exist.

    Raises:
        ValueError: If no key begins with the prefix.

    Example:
        >>> list(backbone_state_dict({'state_dict': {'backbone.smb1.bias': 1, 'decode_head.conv_seg.bias': 2}}))
        ['smb1.bias']
    """
    outer = next((key for key in OUTER_KEYS if isinstance(checkpoint.get(key), Mapping)), None)
    weights = checkpoint if outer is None else checkpoint[outer]
    weights = {key.removeprefix('module.'): value for key, value in weights.items()}
    if prefix is None and not any(key.startswith('backbone.') for key in weights):
        return weights
    prefix = ('backbone' if prefix is None else prefix).removesuffix('.') + '.'
    found = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if not found:
        heads = sorted({key.split('.')[0] for key in weights})
        raise ValueError(
            f'the checkpoint has no key that begins with {prefix!r}; its keys begin with {heads}: '
            "give one of those as init_cfg's prefix, or none"
        )
    return found


def load_backbone(backbone: nn.Module, path: str, prefix: str | None = None) -> None:
    """Load a checkpoint's weights into the backbone, in place; leave out and log a classifier's own layers.

    `path` is a file or URL, anything that MMEngine's `CheckpointLoader` takes; `prefix` as in `backbone_state_dict`.

    Raises:
        ValueError: If the checkpoint lacks weights of the backbone.
        RuntimeError: If a weight's shape differs from the backbone's.
    """
    weights = backbone_state_dict(CheckpointLoader.load_checkpoint(path, map_location='cpu'), prefix)
    missing, unexpected = backbone.load_state_dict(weights, strict=False)
    if missing:
        raise ValueError(
            f'{path} lacks {len(missing)} weights of {type(backbone).__name__}, the first is {missing[0]!r}: '
            f'it belongs to another architecture, or needs a prefix in init_cfg; its keys are like '
            f'{next(iter(weights), None)!r}'
        )
    print_log(f'loaded {path}; left out: {unexpected or "nothing"}', logger='current')
