"""The page, the picture, the charts and the card of a run, from plain values."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.report import card, report_page
from mmcpd.report.charts import chart
from mmcpd.report.data import ClassScore, Curve, Frozen, Layer, Picture, Predictions, Quantity, RunReport, Setting, View
from mmcpd.report.html import STYLE
from mmcpd.report.layers import layers, streams
from mmcpd.report.page import MORE_STYLE
from mmcpd.report.picture import lanes, model_picture
from mmcpd.report.words import answer, facts
from mmcpd.slim import slim

DOT = 'data:image/gif;base64,R0lGODlhAQABAAAAACw='


class Residual(nn.Module):
    """Two layers that are added, a depthwise one behind them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.deep, self.head = nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.deep(x + self.back(self.inner(x).relu())).mean((2, 3)))


@pytest.fixture(scope='module')
def combed():
    return comb(Residual(), torch.rand(1, 3, 8, 8))


def shapes(coupling, removed):
    keep = coupling.keep()
    for name, count in removed.items():
        keep[name][:count] = False
    small = slim(Residual(), coupling, keep)
    return {name: tuple(value.shape) for name, value in small.state_dict().items()}


def full_report(**changes):
    """Everything that a report can have, with names that are hard to lay out."""
    long = 'backbone.stages_of_the_encoder.3.transformer_blocks.11.attention.qkv_projection'
    shown = [
        Layer(f'{long}.{n}', 64 * (n % 7 + 1), 32 * (n % 7 + 1), 4096, 2048, long, 'model output') for n in range(9)
    ]
    curve = Curve('decode.loss_ce', '', [10, 20, 30000], [1e-5, 2e-5, 1.5e-5])
    views = [View(name, DOT, 160, 160) for name in ('picture', 'labels', 'dense', 'slim')]
    scored = [ClassScore('a class of a rather long name', 123456789, 12.5, None, '#ff0000')]
    found = Predictions('IoU, %', 'pixels', 'By class on all 2 pictures', scored, [Picture('Picture 1', views)])
    report = RunReport(
        title='run', model='EncoderDecoder (SeaFormer)', data='a data set', stage='pruned to the target: x',
        quantities=[
            Quantity('MACs', 'M', 123456.7, 60000.0), Quantity('parameters', 'M', 25.6, 9.1),
            Quantity('activations', 'MiB', 10.0, 8.0), Quantity('latency', 'ms', 8.0, 6.0),
            Quantity('synthetic/mIoU', '', 70.0, 69.5, False),
        ],
        metric='synthetic/mIoU', layers=shown, frozen=[Frozen(f'not seen (read by {long})', 3)],
        costs=[Curve('MACs', '%', [10, 20], [100.0, 50.0]), Curve('parameters', '%', [10, 20], [100.0, 40.0])],
        curves=[curve], events=[12, 14], predictions=found, settings=[Setting('checkpoint', '/a/' + 'b' * 120)],
        versions=[Setting('mmcpd', '1')], command='mmcpd train ' + 'x' * 150, config='model = dict()',
        load='model = ...', missing=['Latency: ' + 'y' * 100],
    )  # fmt: skip
    return replace(report, **changes)


def test_layers_have_the_widths_of_the_slim_model(combed):
    found = {layer.path: (layer.dense, layer.kept) for layer in layers(combed, shapes(combed, {'stem': 2, 'inner': 3}))}
    assert found == {'stem': (8, 6), 'inner': (6, 3), 'back': (8, 6), 'deep': (8, 6), 'head': (2, 2)}
    assert {layer.path: layer.kept for layer in layers(combed, {})}['stem'] == 8  # nothing is known to be cut


def test_a_layer_counts_its_parameters_and_says_why_it_stays(combed):
    *_, head = layers(combed, shapes(combed, {'stem': 2}))
    assert (head.dense_params, head.slim_params, head.frozen, head.group) == (18, 14, 'model output', '')


def test_what_is_added_is_one_stream_and_depthwise_writes_none(combed):
    shown = layers(combed, shapes(combed, {'stem': 2}))
    (stream,) = streams(combed, shown)
    paths = [[shown[number].path for number in numbers] for numbers in (stream.writers, stream.readers)]
    assert (paths[0], stream.units, stream.kept) == (['stem', 'back'], 8, 6)
    assert 'head' in paths[1] and 'deep' not in paths[0]


def test_a_stream_is_a_lane_through_all_its_layers(combed):
    shown = layers(combed, {})
    picture = model_picture(shown, streams(combed, shown))
    rows = picture.split('<li')[1:]
    assert [row.count('var(--c0)') for row in rows[:3]] == [2, 2, 2]  # written, read, written
    assert model_picture(shown, []).count('var(--c') == 0
    assert not lanes([])


def test_the_page_opens_with_the_answer_and_four_numbers():
    report = full_report()
    page = report_page(report)
    assert answer(report).endswith('and its synthetic/mIoU is 69.50 (dense 70.00).')
    assert [fact.value for fact in facts(report)] == [
        '48.6 %',
        '35.5 %',
        '75.0 %',
        '69.50',
    ]  # latency before activations
    assert page.index(answer(report)) < page.index('class="facts"') < page.index('<h2>')
    assert [fact.value for fact in facts(full_report(metric=''))] == ['48.6 %', '35.5 %', '75.0 %', '80.0 %']


def test_the_page_needs_nothing_else_and_escapes_what_it_is_given():
    page = report_page(full_report(title='<script>alert(1)</script>', command='a & <b>'))
    assert '<script' not in page and 'a &amp; &lt;b&gt;' in page
    assert not re.search(r'https?:|<link|@import|url\((?!#)|src="(?!data:)', page)
    assert re.search(r'src="(?!data:)', page.replace(DOT, 'photo.jpg'))  # the check can fail


def test_what_a_run_has_not_is_left_out():
    bare = full_report(layers=[], frozen=[], costs=[], curves=[], predictions=None, settings=[], command='', load='')
    titles = set(re.findall(r'<h2>(.*?)</h2>', report_page(full_report())))
    left = set(re.findall(r'<h2>(.*?)</h2>', report_page(bare)))
    assert titles - left == {
        'The model', 'The training', 'Predictions', 'Layer by layer', 'What is frozen, and why', 'To repeat it',
        'To load the slim model', 'Settings',
    }  # fmt: skip
    assert 'What is not in this report' in left


def test_commands_in_sentences_are_code():
    made = report_page(full_report(missing=['`mmcpd <x>` measures it, `mmcpd report` shows it.']))
    assert '<li><code>mmcpd &lt;x&gt;</code> measures it, <code>mmcpd report</code> shows it.</li>' in made


def test_a_report_is_json():
    assert json.loads(json.dumps(asdict(full_report())))['streams'] == []


def test_charts_take_the_colours_of_the_page_and_have_axes_with_units():
    svg = chart('what remains', [Curve('MACs', '%', [1, 9], [100.0, 50.0])], '% of the dense model', [4])
    texts = re.findall(r'<text style="([^"]*)', svg)
    assert texts and all('fill: var(--' in style for style in texts)
    assert not re.search(r'#[0-9a-f]{6}', svg)  # no colour of its own, above all no white behind it
    assert '% of the dense model' in svg and '>iteration<' in svg


def test_charts_on_one_page_share_no_names():
    one, two = (chart(name, [Curve(name, '', [1, 2], [1.0, 2.0])], '') for name in ('loss', 'top1'))
    names = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, two)]
    assert names[0] and not names[0] & names[1]
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', one))
    assert used and used <= names[0]


@pytest.mark.parametrize('dark', [False, True])
def test_text_is_readable(dark):
    def luminance(colour):
        colour = colour if len(colour) == 6 else ''.join(2 * c for c in colour)
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one, other):
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    blocks = [style.split('@media screen and (prefers-color-scheme: dark)') for style in (STYLE, MORE_STYLE)]
    parts = [part[dark].partition('}')[0] if dark else part[0] for part in blocks]
    colours = dict(re.findall(r'--(\w+): #(\w+)', ' '.join(parts)))
    for name in ('ink', 'soft', 'mark', 'c0', 'c1', 'c2', 'c3'):
        assert contrast(colours[name], colours['paper']) >= 4.5, name
    assert contrast('8b949e' if not dark else '57606a', colours['paper']) < 4.5  # a grey that is not enough


def test_the_card_says_what_is_not_known():
    text = card(full_report())
    assert '## Licence\n\nunknown' in text and '| MACs | 123,456.70 M | 60,000.00 M | 48.6 % |' in text
    assert 'model = ...' in text and 'unknown: this run' not in card(full_report(license='Apache-2.0'))
