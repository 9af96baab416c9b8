"""Rotate: sort the dimensions inside attention heads by what they carry, without changing what the model computes."""

from .api import rotate_
from .report import HeadKind, LeftAlone, Rotated, Rotations

__all__ = ['HeadKind', 'LeftAlone', 'Rotated', 'Rotations', 'rotate_']
