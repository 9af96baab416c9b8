"""Comb: find out which channels of a model belong together."""

from .api import comb

__all__ = ['comb']
