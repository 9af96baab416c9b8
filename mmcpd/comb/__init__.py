"""Comb: find out which channels of a model belong together."""

from .api import comb
from .cost import COSTS, Cost
from .errors import CombError, SlimError
from .groups import Comb, Frozen, Group, Keep, Member

__all__ = ['COSTS', 'Comb', 'CombError', 'Cost', 'Frozen', 'Group', 'Keep', 'Member', 'SlimError', 'comb']
