"""Refit: give a pruned model new weights in closed form, without training."""

from .absorb import Absorbed, absorb_
from .api import Refitted, refit
from .report import RefitReport, RefittedLayer, SkippedLayer

__all__ = ['Absorbed', 'RefitReport', 'Refitted', 'RefittedLayer', 'SkippedLayer', 'absorb_', 'refit']
