"""Prune: score the units, and mask those that matter least while the model trains."""

from .importance import IMPORTANCES, Importance, build_importance, check_importance, register_importance
from .normalize import NORMALIZERS, normalize
from .pruner import Pruner
from .schedule import Schedule
from .scores import Curvature, GroupFisher, Hessian, Magnitude, Random
from .selection import check_floors, check_reachable, reachable, select, shares

__all__ = [
    'IMPORTANCES', 'NORMALIZERS', 'Curvature', 'GroupFisher', 'Hessian', 'Importance', 'Magnitude', 'Pruner', 'Random',
    'Schedule', 'build_importance', 'check_floors', 'check_importance', 'check_reachable', 'normalize', 'reachable',
    'register_importance', 'select', 'shares',
]  # fmt: skip
