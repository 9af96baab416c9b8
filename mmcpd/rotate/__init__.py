"""Rotate: sort the dimensions inside attention heads by what they carry, without changing what the model computes."""

from .api import rotate_
from .report import HeadKind, Rotated, Rotations, SkippedHeads

__all__ = ['HeadKind', 'Rotated', 'Rotations', 'SkippedHeads', 'rotate_']
