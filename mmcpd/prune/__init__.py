"""Prune: score the units, mask those that matter least, cut them out."""

from .masks import Masker, mask_
from .slim import restructure_, slim, structure

__all__ = ['Masker', 'mask_', 'restructure_', 'slim', 'structure']
