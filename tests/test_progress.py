"""A line a stage: how far, and how long still."""

from __future__ import annotations

import io
import re

from mmcpd import progress
from mmcpd.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_at_a_time_elsewhere_and_one_line_in_a_terminal():
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        show = ProgressLine('measuring', 'rounds', stream, every=0)
        show(1, 1000, 125.0)
        show(1000, 1000, 0.0)
    first, last = 'measuring: 1/1000 rounds, 2:05 left', 'measuring: 1000/1000 rounds, 0:00 left'
    assert plain.getvalue() == f'{first}\n{last}\n'
    assert re.sub(' +', ' ', terminal.getvalue()) == f'\r{first} \r{last} \n'


def test_not_more_often_than_asked_but_always_at_the_end():
    rare = io.StringIO()
    show = ProgressLine('scoring', 'batches', rare, every=3600)
    show(1, 3)
    assert rare.getvalue() == ''
    show(3, 3)
    assert rare.getvalue() == 'scoring: 3/3 batches, 0:00 left\n'


def test_the_time_left_is_worked_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
    stream = io.StringIO()
    show = ProgressLine('refitting', 'batches', stream, every=0)
    show(0, 4)
    now[0] += 30
    show(1, 4)
    assert stream.getvalue() == 'refitting: 0/4 batches\nrefitting: 1/4 batches, 1:30 left\n'


def test_an_unknown_total_is_counted_without_an_end():
    plain, terminal, rare = io.StringIO(), Terminal(), io.StringIO()
    for stream, every in ((plain, 0), (terminal, 0), (rare, 3600)):
        show = ProgressLine('scoring', 'batches', stream, every=every)
        for done in (0, 1, 7):
            show(done, 0)
    assert plain.getvalue() == 'scoring: 0 batches\nscoring: 1 batches\nscoring: 7 batches\n'
    assert terminal.getvalue().count('\r') == 3 and not terminal.getvalue().endswith('\n')
    assert rare.getvalue() == ''
    show(7, 7)
    assert rare.getvalue() == 'scoring: 7/7 batches, 0:00 left\n'
