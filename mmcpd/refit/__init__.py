"""Refit: give a pruned model new weights in closed form, without training."""

from .api import Refitted, refit
from .report import Left, RefitReport, RefittedLayer

__all__ = ['Left', 'RefitReport', 'Refitted', 'RefittedLayer', 'refit']
