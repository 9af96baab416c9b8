"""The page in a real browser: nothing overflows, is cut or lies on something else, at any width, in any colours."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmcpd.report import report_page
from tests.browser import Page, browser
from tests.test_report.test_page import full_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser() is None, reason='there is no Chromium: apt-get install chromium'),
]
WAYS = {
    'desktop': dict(width=1280), 'desktop, dark': dict(width=1280, dark=True), 'phone': dict(width=390),
    'phone, dark': dict(width=390, dark=True), 'paper': dict(width=794, paper=True),
    'paper, from a dark screen': dict(width=794, dark=True, paper=True),
}  # fmt: skip


@pytest.fixture(scope='module')
def page():
    with Page() as opened:
        yield opened


@pytest.fixture(scope='module')
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('report') / 'report.html'
    path.write_text(report_page(full_report()), encoding='utf-8')
    return path


@pytest.mark.parametrize('way', WAYS)
def test_nothing_is_cut(page, file, way):
    page.open(file, **WAYS[way])
    assert page.faults() == []


def test_colours_follow_the_screen_and_paper_is_white(page, file):
    found = []
    for way in ('desktop', 'desktop, dark', 'paper, from a dark screen'):
        page.open(file, **WAYS[way])
        found.append(page.ask('getComputedStyle(document.body).backgroundColor'))
    assert found == ['rgb(255, 255, 255)', 'rgb(20, 24, 29)', 'rgb(255, 255, 255)']


def test_faults_are_found(page, tmp_path):
    path = tmp_path / 'bad.html'
    texts = '<text x="5" y="20">one</text><text x="8" y="20">two</text>'
    path.write_text(f'<p style="width: 3em; overflow: hidden">{"w" * 50}</p><svg width="90" height="40">{texts}</svg>'
                    '<div style="width: 900px">wide</div>')  # fmt: skip
    page.open(path, width=390)
    assert {fault.split(':')[0] for fault in page.faults()} >= {'cut', 'on each other'}
