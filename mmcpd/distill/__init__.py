"""Compare a student with a teacher: distillation losses over named module outputs, in pure torch."""

from __future__ import annotations

from .cirkd import CIRKDLoss
from .losses import CWDLoss, DistillLoss, DISTLoss, FeatureLoss, KDLoss
from .taps import Tap, Taps

__all__ = ['CIRKDLoss', 'CWDLoss', 'DISTLoss', 'DistillLoss', 'FeatureLoss', 'KDLoss', 'Tap', 'Taps']
