"""Prune: score the units, and mask those that matter least, in one step or while the model trains."""

from .gauss_newton import GaussNewton
from .importance import IMPORTANCES, Importance, build_importance, check_importance, register_importance
from .normalize import NORMALIZERS, default_normalizer, normalize
from .pruner import Pruner
from .reach import check_reachable, few_events
from .remain import check_remain
from .schedule import LATENCY, Schedule
from .scores import Curvature, GroupFisher, Hessian, Magnitude, Random
from .scoring import score
from .selection import check_floors, reachable, select, shares

__all__ = [
    'IMPORTANCES', 'LATENCY', 'NORMALIZERS', 'Curvature', 'GaussNewton', 'GroupFisher', 'Hessian', 'Importance',
    'Magnitude', 'Pruner', 'Random', 'Schedule', 'build_importance', 'check_floors', 'check_importance',
    'check_reachable', 'check_remain', 'default_normalizer', 'few_events', 'normalize', 'reachable',
    'register_importance', 'score', 'select', 'shares',
]  # fmt: skip
