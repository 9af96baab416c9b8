"""Compare a student with a teacher: distillation losses over named module outputs, in pure torch."""

from __future__ import annotations

from .cirkd import CIRKDLoss
from .losses import CWDLoss, DistillLoss, DISTLoss, FeatureLoss, KDLoss
from .observe import Compared, Observer, Output
from .taps import Tap, Taps, expanded

__all__ = [
    'CIRKDLoss',
    'CWDLoss',
    'Compared',
    'DISTLoss',
    'DistillLoss',
    'FeatureLoss',
    'KDLoss',
    'Observer',
    'Output',
    'Tap',
    'Taps',
    'expanded',
]
