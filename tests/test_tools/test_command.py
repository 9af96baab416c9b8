"""The console command: its help, names of configs with ::, and a screen that shows what the user needs."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmcpd.__main__ import COMMANDS, main
from mmcpd.cli import runner
from mmcpd.cli.common import UserError
from mmcpd.cli.configs import config_file
from tests.helpers import without_old_warning

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Return `run(*arguments) -> (exit status, stdout, stderr)`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        return stop.value.code, *capfd.readouterr()

    return run


def test_help_names_every_command_at_once():
    code = 'import sys, mmcpd.__main__ as m; sys.argv[1:] = ["--help"]\ntry: m.main()\nexcept SystemExit: pass\n'
    code += 'print([name for name in ("torch", "mmengine") if name in sys.modules])'
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == '[]', done.stderr
    for name, text in COMMANDS.items():
        assert any(line.split()[:1] == [name] for line in done.stdout.splitlines())
        assert text.split()[0] in done.stdout


@pytest.mark.parametrize('name', COMMANDS)
def test_the_table_says_what_the_command_s_own_help_says(command, name):
    assert import_module(f'mmcpd.cli.{name.replace("-", "_")}').__doc__.splitlines()[0] == COMMANDS[name]
    code, out, _ = command(name, '--help')
    assert code == 0
    assert out.startswith(f'usage: mmcpd {name} ')
    assert COMMANDS[name] in out
    assert f'  mmcpd {name} ' in out  # an example


@pytest.mark.parametrize('arguments', [(), ('trian', 'x.py'), ('train',), ('train', 'x.py', '--no-such-option')])
def test_wrong_usage_is_status_2(command, arguments):
    code, _, err = command(*arguments)
    assert code == 2
    assert err.startswith('usage: mmcpd')


def test_a_module_runs_as_the_command_does(tiny):
    done = subprocess.run(
        [sys.executable, '-m', 'mmcpd', 'slim', str(tiny), 'none.pth'],
        capture_output=True,
        text=True,
        cwd=tiny.parent,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    said = without_old_warning(done.stderr)
    assert (done.returncode, said) == (1, 'error: checkpoint: there is no checkpoint none.pth\n')


@pytest.mark.parametrize('name', COMMANDS)
def test_a_tool_is_its_command_and_nothing_else(name):
    tree = ast.parse((ROOT / 'tools' / f'{name.replace("-", "_")}.py').read_text())
    (last,) = tree.body[-1].body
    assert ast.unparse(last) == f"main(['{name}', *sys.argv[1:]])"
    assert len(tree.body) == 4  # docstring, two imports, the call


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('tin.py', ['tin.py: there is no such config', 'near are tiny.py']),
        ('none/x.py', ['none has none']),
        ('mmpretrain::resnet/resnet18_8xb32.py', ['no such config', 'mmpretrain::resnet/resnet18_8xb32_in1k.py']),
        ('mmseg::fcn/fcn_r50.py', ['no such config', 'mmseg::fcn/fcn_r50-d8_4xb']),
        ('mmpretran::resnet/resnet18_8xb32_in1k.py', ["no package 'mmpretran'", 'near are mmpretrain']),
        ('../x::y.py', ["no package '../x'"]),
        ('torch::x.py', ['torch has no configs']),
    ],
)
def test_a_wrong_name_is_one_line_with_near_names(command, tiny, name, words):
    code, _, err = command('comb', name)
    assert code == 1
    (line,) = err.splitlines()
    for word in words:
        assert word in line


def test_a_file_that_is_no_config_and_a_model_without_a_scope_are_said(command, tmp_path):
    (tmp_path / 'notes.md').write_text('# notes')
    (tmp_path / 'alone.py').write_text("model = dict(type='EncoderDecoder')\n")
    assert (
        command('comb', tmp_path / 'notes.md')[2].strip().endswith('is no config: those end in .py, .yml, .yaml, .json')
    )
    code, _, err = command('comb', tmp_path / 'alone.py')
    assert code == 1
    assert err.strip().endswith("does not say which package has its EncoderDecoder: add default_scope = 'mmseg'")


@pytest.mark.parametrize(
    'name', ['mmpretrain::resnet/resnet18_8xb32_in1k.py', 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py']
)
def test_a_name_with_a_package_is_a_file_of_that_package(name):
    file = config_file(name)
    assert file.is_file()
    assert file.parts[-5:-2] == (name.partition('::')[0], '.mim', 'configs')


def test_a_config_of_a_package_is_combed_and_its_work_dir_has_its_name(command, tmp_path):
    code, out, err = command('comb', 'mmpretrain::resnet/resnet18_8xb32_in1k.py', '--shape', 3, 64, 64)
    assert code == 0, err
    assert 'backbone.layer1.0.conv1' in out
    code, _, err = command('train', 'mmpretrain::resnet/resnet18_8xb16_cifar10.py', '--cfg-options', 'load_from=x.pth')
    assert code == 1
    assert err == 'error: load_from: there is no checkpoint x.pth\n'


def test_the_screen_shows_the_run_and_the_log_file_everything(tool, pruning, tmp_path):
    code, out, err = tool('train', pruning)
    assert code == 0, err
    assert err == ''
    lines = out.splitlines()
    first = next(number for number, line in enumerate(lines) if 'Epoch(train)' in line)
    assert first <= 12, out
    # Neither the configuration nor initial weights.
    assert not [line for line in lines[:first] if line.startswith('backbone') or 'backbone=dict(' in line]
    assert [line for line in lines if 'Epoch(val)' in line]
    (log,) = tmp_path.glob('work_dirs/prune/*/*.log')
    content = log.read_text()
    for text in ('System environment', "type='mmcpd.PruneHook'", 'Hooks will be executed', 'Epoch(train)'):
        assert text in content
    for text in ('System environment', "type='mmcpd.PruneHook'", 'Hooks will be executed', 'FileClient', 'Exp name'):
        assert text not in out


@pytest.mark.parametrize(
    ('file', 'level', 'text', 'before', 'later'),
    [
        ('/x/mmengine/runner/runner.py', logging.INFO, 'Config:', False, True),
        ('/x/mmengine/runner/runner.py', logging.WARNING, 'no seed', True, True),
        (f'{runner.PACKAGE}/engine/hooks.py', logging.INFO, 'pruning to 50 %', True, True),
        ('/x/mmengine/logging/logger.py', logging.WARNING, '"FileClient" will be deprecated in future.', False, False),
        ('/x/mmengine/logging/logger.py', logging.ERROR, 'it failed', True, True),
    ],
)
def test_what_the_screen_shows_before_the_loop_and_later(file, level, text, before, later):
    screen = runner.ScreenFilter()
    record = logging.LogRecord('mmengine', level, file, 1, text, None, None)
    assert screen.filter(record) is before
    screen.loop_runs = True
    assert screen.filter(record) is later


def test_a_runner_of_the_user_s_own_keeps_its_class(monkeypatch):
    class Theirs(Runner):
        @classmethod
        def from_cfg(cls, cfg):
            return cls

    monkeypatch.setitem(RUNNERS.module_dict, 'Theirs', Theirs)
    built = runner.build_runner(Config({'runner_type': 'Theirs'}))
    assert issubclass(built, Theirs)
    assert built.build_logger is runner.ScreenRunner.build_logger
    with pytest.raises(UserError, match='runner_type: no Runner is registered as'):
        runner.build_runner(Config({'runner_type': 'Nobodys'}))
