"""`mmcpd prune --remain`: floors by pattern, and the words that are none."""

from __future__ import annotations

import pytest

from mmcpd.engine.slim_file import read_slim
from tests.test_tools.test_prune import SMALL, dense  # noqa: F401 - a fixture

LATE = 'backbone.layer4.1.conv1'


def widths(tool, config, checkpoint, out, *words) -> int:
    """Return how many channels a layer has left after pruning."""
    arguments = ('--target', 'params=0.5', *SMALL, '--no-validate', '--no-refit', '--out', out, *words)
    code, _, err = tool('prune', config, checkpoint, *arguments)
    assert code == 0, err
    return read_slim(out / 'slim.pth')['structure']['tensors'].get(f'{LATE}.weight', [64])[0]


def test_the_command_line_and_the_config_name_floors(tool, tiny, dense, tmp_path):  # noqa: F811
    own = tiny.with_name('own.py')
    own.write_text(
        f"_base_ = './tiny.py'\ndefault_hooks = dict(prune=dict(type='mmcpd.PruneHook', remain={{'{LATE}': 1.0}}))\n"
    )
    assert widths(tool, tiny, dense, tmp_path / 'free') < 52
    assert 52 <= widths(tool, tiny, dense, tmp_path / 'named', '--remain', 'backbone.layer4.1.*=0.8', '*conv1=0.1') < 64
    assert widths(tool, own, dense, tmp_path / 'config') == 64
    assert widths(tool, own, dense, tmp_path / 'both', '--remain', 'backbone.layer1.*=0.5') < 52  # instead of it


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['0.8'], "--remain: '0.8' is not PATTERN=SHARE"),
        (['a=b'], "--remain: 'a=b' is not PATTERN=SHARE"),
        (['backbone.*=80'], "remain['backbone.*'] is a share"),
        (['backbone.*=0.8', 'backbone.*=0.9'], 'is there twice'),
        (['layer4=0.8'], "remain pattern 'layer4' fits no group"),
        (['*=0.99'], "remain={'*': 0.99}"),
    ],
)
def test_a_wrong_floor_is_one_line(tool, tiny, dense, tmp_path, words, message):  # noqa: F811
    code, _, err = tool('prune', tiny, dense, '--target', 'macs=0.5', *SMALL, '--no-validate', '--remain', *words)
    (line,) = [each for each in err.splitlines() if each.startswith('error: ')]
    assert code == 1 and message in line
    assert not list(tmp_path.rglob('slim.pth'))
