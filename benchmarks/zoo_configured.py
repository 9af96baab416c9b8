"""Build a network of OpenMMLab from a config file that its package installs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.zoo_family import Deployed, Family


@dataclass(frozen=True)
class Configured(Family):
    """Hold a row that is built from a config of OpenMMLab.

    `config` is a path below `<package>/.mim/configs`; `changes` are overrides of the config, by dotted keys, where the
    file as it stands is too large or cannot be read.
    """

    changes: dict[str, Any] = field(default_factory=dict)

    def net(self) -> Deployed:
        return Deployed(self.network())

    def network(self) -> nn.Module:
        """Build the bare network.

        Nothing is downloaded: `init_cfg`, `pretrained` and `teacher_ckpt` are taken out. Auxiliary heads, which are
        there for training only, are left away, and SyncBN becomes BN.
        """
        from mmengine.config import Config, ConfigDict
        from mmengine.registry import MODELS, DefaultScope

        importlib.import_module(f'{self.package}.models')
        config = Config.fromfile(str(config_root(self.package) / self.config)) if self.config else Config()
        config.merge_from_dict(self.changes)
        model = self.smaller(local(config.model.to_dict()))
        model.pop('auxiliary_head', None)
        with DefaultScope.overwrite_default_scope(self.package):
            return MODELS.build(ConfigDict(model))

    def smaller(self, model: dict[str, Any]) -> dict[str, Any]:
        """Change a model's config where it would take long."""
        return model


def dotted(changes: dict[str, Any]) -> dict[str, Any]:
    """Put a dot for each double underscore in the names of changes."""
    return {name.replace('__', '.'): value for name, value in changes.items()}


def config_root(package: str) -> Path:
    """Find the folder of a package's configs; mmcpd's own is the checkout's."""
    if package == 'mmcpd':
        return Path(__file__).resolve().parents[1] / 'configs'
    return Path(importlib.import_module(package).__file__).parent / '.mim' / 'configs'


def local(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {k: local(v) for k, v in value.items() if k not in ('init_cfg', 'pretrained', 'teacher_ckpt')}
        if kept.get('type') == 'SyncBN':
            kept['type'] = 'BN'
        return kept
    return type(value)(local(v) for v in value) if isinstance(value, list | tuple) else value
