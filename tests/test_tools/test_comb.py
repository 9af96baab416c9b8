"""`mmcpd comb`: one line first, then a row a group; a look ahead, sensitivity, JSON and a page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from mmcpd.engine.slim_file import read_slim
from mmcpd.report.html import STYLE
from tests.test_tools.test_prune import SMALL, dense  # noqa: F401 - a fixture

LAYER = 'backbone.layer2.0.conv1'


class Page(HTMLParser):
    """Note the tags and what they refer to; every tag that is opened must be closed."""

    VOID = ('meta', 'rect', 'polyline', 'br', 'link', 'img', 'input')

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.links += [value for name, value in attrs if name in ('src', 'href', 'xlink:href')]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_it_begins_with_one_line_and_has_a_row_a_group(tool, tiny):
    code, out, err = tool('comb', tiny)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == '12 groups, 360 units; 100 % of the units and 100 % of the parameters can be pruned'
    assert re.fullmatch(r'[\d,.]+ M MACs, [\d,.]+ M parameters, [\d,.]+ MiB of activations', lines[1])
    row = next(line.split() for line in lines if line.startswith(LAYER))
    # 16 channels; its rows of 8 x 9 and the columns of the next layer, 16 x 9, and two of its norm
    assert row[1:4] == ['16', '1', '1'] and row[6] == str(72 + 144 + 2)
    assert 'units chosen by' not in out


def test_a_target_shows_what_pruning_to_it_leaves(tool, tiny, dense, tmp_path):  # noqa: F811
    files = ('--json', 'o/c.json', '--html', 'o/c.html')
    options = ('--checkpoint', dense, '--pictures', 32, '--target', 'macs=0.5', 'params=0.6', '--remain', f'{LAYER}=1')
    code, out, err = tool('comb', tiny, *options, '--sensitivity', *files)
    assert code == 0, err
    assert 'at macs=0.5 and params=0.6, units chosen by gauss_newton (on 32 pictures)' in out
    content = json.loads((tmp_path / 'o' / 'c.json').read_text())
    ahead = content['preview']
    assert content['summary'] == out.splitlines()[0] and len(content['groups']) == 12
    assert (
        ahead['slim']['macs'] <= 0.5 * ahead['dense']['macs']
        and ahead['slim']['params'] <= 0.6 * ahead['dense']['params']
    )
    widths = {each['layer']: (each['dense'], each['kept']) for each in ahead['layers']}
    assert widths[LAYER] == (16, 16) and any(kept < whole for whole, kept in widths.values())
    assert len(content['sensitivity']['groups']) == 12
    # what pruning really leaves
    real = (
        '--target',
        'macs=0.5',
        'params=0.6',
        '--remain',
        f'{LAYER}=1',
        '--no-validate',
        '--no-refit',
        '--no-rotate',
    )
    assert tool('prune', tiny, dense, *real, *SMALL, '--out', 'p')[0] == 0
    left = read_slim(tmp_path / 'p' / 'slim.pth')['meta']['slim']
    assert {name: left[name] for name in ('macs', 'params', 'memory')} == pytest.approx(
        {name: ahead['slim'][name] for name in ('macs', 'params', 'memory')}, rel=0.02
    )


def test_the_page_stands_alone(tool, tiny, dense, tmp_path):  # noqa: F811
    options = ('--checkpoint', dense, '--pictures', 32, '--target', 'macs=0.5', '--sensitivity')
    assert tool('comb', tiny, *options, '--html', 'c.html')[0] == 0
    text = (tmp_path / 'c.html').read_text(encoding='utf-8')
    page = Page()
    page.feed(text)
    assert not page.open and not page.links and not {'script', 'link', 'img', 'iframe'} & set(page.seen)
    assert not re.search(r'https?:|url\(|@import|//[a-z]', text)
    assert page.seen.count('svg') == 12 and page.seen.count('meter') >= 12
    assert 'prefers-color-scheme: dark' in text and 'width=device-width' in text
    assert '12 groups, 360 units' in text and 'gauss_newton (on 32 pictures)' in text


def luminance(colour: str) -> float:
    digits = colour if len(colour) == 6 else ''.join(2 * each for each in colour)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize('block', [0, 1], ids=['light', 'dark'])
def test_its_text_can_be_read(block):
    colours = [dict(re.findall(r'--(\w+): #(\w+)', part)) for part in STYLE.split('@media screen and (prefers')[:2]][
        block
    ]
    assert set(colours) == {'ink', 'soft', 'paper', 'line', 'mark'}
    for name in ('ink', 'soft', 'mark'):
        one, other = sorted((luminance(colours[name]), luminance(colours['paper'])))
        assert (other + 0.05) / (one + 0.05) >= 4.5, name


def test_without_data_the_weights_are_weighed(tool, tiny, tmp_path):
    bare = tiny.with_name('bare.py')
    bare.write_text("_base_ = './tiny.py'\ntrain_dataloader = None\n")
    code, out, err = tool('comb', bare, '--target', 'params=0.5', '--shape', 3, 32, 32)
    assert code == 0, err
    assert 'units chosen by magnitude (no data: the config has no train_dataloader; of initial weights' in out


@pytest.mark.slow
def test_accuracy_of_each_group_alone(tool, tiny, dense, tmp_path):  # noqa: F811
    code, out, err = tool(
        'comb', tiny, '--checkpoint', dense, '--pictures', 16, '--sensitivity', '--accuracy', '--json', 'c.json'
    )
    assert code == 0, err
    found = json.loads((tmp_path / 'c.json').read_text())['sensitivity']
    assert found['measure'] == 'accuracy/top1' and 'accuracy/top1 where one group alone is pruned' in out
    values = {each['group']: each['values'] for each in found['groups']}
    assert len(values) == 12 and all(0 <= value <= 100 for each in values.values() for value in each)
    assert len({value for each in values.values() for value in each}) > 1


def test_latency_is_measured_on_the_slim_model(tool, tiny, tmp_path):
    pytest.importorskip('onnxruntime')
    options = ('--target', 'memory=0.6', '--latency', '--runs', 5, '--threads', 1)
    code, out, err = tool('comb', tiny, *options, '--html', 'c.html')
    assert code == 0, err
    said = re.search(
        r'latency in ONNX Runtime at 1x3x32x32: slim [\d.]+ ms, dense [\d.]+ ms .* of 5 pairs, 1 threads', out
    )
    assert said and said[0] in (tmp_path / 'c.html').read_text()


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--latency'], '--latency says something about --target'),
        (['--accuracy'], '--accuracy says something about --sensitivity'),
        (['--remain', 'x=0.5'], '--remain says something about --target'),
        (['--target', 'macs'], "--target: 'macs' is not QUANTITY=SHARE"),
        (['--target', 'flops=0.5'], "unknown quantity 'flops'"),
        (['--target', 'macs=1.5'], 'between 0 and 1'),
        (['--shape', '3', '-1', '32'], '--shape must be 1 or more, not [3, -1, 32]'),
        (['--target', 'macs=0.5', '--pictures', '0'], '--pictures must be 1 or more'),
        (['--target', 'macs=0.5', '--remain', 'layer9=0.5'], "remain pattern 'layer9' fits no group"),
        (['--target', 'macs=0.0001'], 'macs cannot go down to 0.0001'),
        (['--target', 'macs=0.5', '--images', 'none'], 'there is no folder'),
        (['--html', '{tiny}/inside/c.html'], '--html: cannot write'),
    ],
)
def test_bad_input_is_one_line(tool, tiny, words, message):
    code, _, err = tool('comb', tiny, *(word.format(tiny=tiny) for word in words))
    (line,) = [each for each in err.splitlines() if each.startswith('error: ')]
    assert code == 1 and message in line
