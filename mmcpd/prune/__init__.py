"""Prune: score the units, and mask those that matter least while the model trains."""

from .importance import IMPORTANCES, Importance, build_importance, register_importance
from .normalize import NORMALIZERS, normalize
from .pruner import Pruner
from .schedule import Schedule, reachable, select, share

__all__ = [
    'IMPORTANCES',
    'NORMALIZERS',
    'Importance',
    'Pruner',
    'Schedule',
    'build_importance',
    'normalize',
    'reachable',
    'register_importance',
    'select',
    'share',
]
