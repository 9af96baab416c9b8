"""Embedded data sets, registered: scikit-learn's handwritten digits, and scenes composed of them."""

from __future__ import annotations

from mmcpd.datasets.boxes import DigitBoxesDataset
from mmcpd.datasets.digits import DigitsDataset
from mmcpd.datasets.scenes import DigitScenesDataset

__all__ = ['DigitBoxesDataset', 'DigitScenesDataset', 'DigitsDataset']
