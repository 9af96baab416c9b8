"""The report of a run as one file of HTML, and the model's card: what they hold, and how it is written.

Nothing here knows MMEngine; `mmcpd/engine/run_report.py` gathers what a run has left.
"""

from __future__ import annotations

from mmcpd.report.card import card
from mmcpd.report.data import RunReport
from mmcpd.report.page import report_page

__all__ = ['RunReport', 'card', 'report_page']
