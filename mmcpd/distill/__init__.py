"""Compare a student with a teacher: distillation losses over named module outputs, in pure torch.

Example:
    >>> import torch
    >>> from mmcpd.distill import KDLoss
    >>> float(KDLoss(tau=4.0)(torch.zeros(2, 10), torch.zeros(2, 10)))
    0.0
"""

from __future__ import annotations

from .cirkd import CIRKDLoss
from .losses import CWDLoss, DistillLoss, DISTLoss, FeatureLoss, KDLoss
from .taps import Tap, Taps

__all__ = ['CIRKDLoss', 'CWDLoss', 'DISTLoss', 'DistillLoss', 'FeatureLoss', 'KDLoss', 'Tap', 'Taps']
