"""Prune: score the units, mask those that matter least, cut them out."""

from .importance import IMPORTANCES, Importance, build_importance, register_importance
from .masks import Masker, mask_
from .normalize import NORMALIZERS, normalize
from .pruner import Pruner
from .schedule import PruneError, Schedule, reachable, select, share
from .slim import restructure_, slim, structure

__all__ = [
    'IMPORTANCES',
    'NORMALIZERS',
    'Importance',
    'Masker',
    'PruneError',
    'Pruner',
    'Schedule',
    'build_importance',
    'mask_',
    'normalize',
    'reachable',
    'register_importance',
    'restructure_',
    'select',
    'share',
    'slim',
    'structure',
]
