"""Slim: mask units, cut them out for real, and describe the result."""

from .mask import mask_
from .slimming import slim
from .structure import restructure_, structure

__all__ = ['mask_', 'restructure_', 'slim', 'structure']
