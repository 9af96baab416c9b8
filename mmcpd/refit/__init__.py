"""Refit: give a pruned model new weights in closed form, without training."""

from .absorb import Absorbed, absorb_
from .api import Refitted, refit
from .report import Left, RefitReport, RefittedLayer

__all__ = ['Absorbed', 'Left', 'RefitReport', 'Refitted', 'RefittedLayer', 'absorb_', 'refit']
